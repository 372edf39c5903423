"""Extraction against the bare forward pass and against peers, on random weights, on whatever device there is.

    python benchmarks/extraction.py                       a Llama of 8 layers x 512 (minutes on two cores)
    python benchmarks/extraction.py --shape llama-3.1-8b  on a GPU: also tokens/s and MFU

Every ratio is the median over interleaved pairs (A B, B A, …) in this one process: machines drift, ratios do not.
Prompts have 40-400 tokens. *Natural batching* is what tokenising a list with ``padding=True`` gives: one batch, every
prompt padded to the longest of the list; a second line cuts batches of 8 in the list's order, each padded to its own
longest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.files import atomic_write, write_json
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.store.extraction import extract

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8x512": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "llama-3.1-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
CUT = 8  # prompts in a batch cut by hand
BEGIN, END = "<!-- benchmarks/extraction.py -->", "<!-- end -->"

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: ``value`` against ``bar`` (a bound, from above if ``at_most``)."""

    name: str
    value: float
    low: float
    high: float
    bar: float | None = None
    at_most: bool = True

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        met = self.value <= self.bar if self.at_most else self.value >= self.bar
        return f"{'<=' if self.at_most else '>='} {self.bar:g}: {'met' if met else 'MISSED'}"

    def cells(self) -> list[str]:
        return [self.name, f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]", self.verdict]


def random_model(shape: str, device: str, dtype: torch.dtype) -> HookedModel:
    """A Llama with random weights, and a tokenizer that is never used."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, pad_token_id=0, **SHAPES[shape])
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"  # part of a store's identity
    )
    return HookedModel(hf.eval(), tokenizer, name=shape)


def ragged_prompts(n: int, vocab: int) -> list[Rendered]:
    """Prompts of 40 to 400 tokens, evenly spread (few random lengths would be a lottery), in random order."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(40, 400, n).round().long()[torch.randperm(n, generator=generator)].tolist()
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        rows.append(Rendered(f"p{i}", "", tuple(ids), ("template",) * length))
    return rows


class Bench:
    """The competitors, each a function without arguments that extracts the same residuals of the same prompts."""

    def __init__(self, model: HookedModel, rows: list[Rendered], peers: bool) -> None:
        self.model, self.rows = model, rows
        self.everything = list(range(model.n_layers))
        self.to_longest = [self._padded(rows)]
        self.to_batch = [self._padded(rows[i : i + CUT]) for i in range(0, len(rows), CUT)]
        orders = token_budget_batches([len(row) for row in rows], model.token_budget)
        self.sorted = [model.inputs(model.batch([rows[i] for i in order])) for order in orders]
        self.bridge = self.traced = None
        if peers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.bridge = load_model(model, backend="transformer_lens").bridge  # type: ignore[attr-defined]
                self.traced = load_model(model, backend="nnsight").traced  # type: ignore[attr-defined]

    def _padded(self, rows: Sequence[Rendered]) -> dict[str, Any]:
        width = max(map(len, rows))
        ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.ids), 1
        device = self.model.device
        positions = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions}

    def forward(self, batches: Sequence[dict[str, Any]]) -> None:
        for given in batches:
            self.model.hf(**given | {"use_cache": False})

    def base_forward(self) -> None:
        for given in self.sorted:
            self.model.base(**given)

    def ours(self, layers: Sequence[int] | None = None) -> Any:
        return self.model.residuals(self.rows, self.everything if layers is None else layers)

    def hidden_states(self, batches: Sequence[dict[str, Any]]) -> list[Any]:
        return [self.model.hf(**given, use_cache=False, output_hidden_states=True).hidden_states for given in batches]

    def transformer_lens(self, batches: Sequence[dict[str, Any]]) -> list[Any]:
        names = [f"blocks.{l}.hook_out" for l in self.everything]
        out = []
        for given in batches:
            ids, rest = given["input_ids"], {k: v for k, v in given.items() if k != "input_ids"}
            out.append(self.bridge.run_with_cache(ids, names_filter=names, return_type=None, **rest)[1])
        return out

    def nnsight(self, batches: Sequence[dict[str, Any]]) -> list[Any]:
        import nnsight

        out, traced, layers = [], self.traced, self.everything
        for given in batches:
            with traced.trace(given, use_cache=False):
                kept = nnsight.save([traced.model.layers[l].output for l in layers])
            out.append(kept)
        return out

    def to_disk(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            extract(self.model, self.rows, Path(folder) / "store")


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one run, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(name: str, a: Work, b: Work, pairs: int, device: torch.device, bar: float | None, at_most: bool) -> Row:
    """Median of a/b over interleaved pairs, with the second lowest and second highest."""
    a(), b()
    found = []
    for i in range(pairs):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        x, y = timed(first, device), timed(second, device)
        found.append(x / y if i % 2 == 0 else y / x)
    found.sort()
    edge = 1 if pairs > 3 else 0
    row = Row(name, statistics.median(found), found[edge], found[-1 - edge], bar, at_most)
    print("  ".join(row.cells()), flush=True)
    return row


def peak_extra(work: Work, device: torch.device) -> float:
    """Bytes above what was held before, at the peak of a run; on the CPU by the kernel's count (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        del kept
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    kept = work()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory_rows(bench: Bench, device: torch.device) -> list[Row]:
    """Peaks of a store on disk, of half and all of the prompts, and of TransformerLens' filtered cache."""
    ours = peak_extra(bench.to_disk, device)
    longest = max(bench.rows, key=len)  # among the fewer too, or their largest batch would differ
    others = [row for row in bench.rows if row.id != longest.id]
    half = Bench(bench.model, [longest, *others[: len(bench.rows) // 2 - 1]], peers=False)
    fewer = peak_extra(half.to_disk, device)
    rows = [Row("peak extra memory, all prompts / half of them", ours / fewer, ours / fewer, ours / fewer)]
    if bench.bridge is not None:
        theirs = peak_extra(lambda: bench.transformer_lens(bench.to_longest), device)
        value = ours / theirs
        rows.append(Row("peak extra memory / TransformerLens filtered cache", value, value, value, 0.40))
        print(
            f"peaks: {ours / 1e6:.0f} MB, half the prompts {fewer / 1e6:.0f} MB, TransformerLens {theirs / 1e6:.0f} MB"
        )
    for row in rows:
        print("  ".join(row.cells()), flush=True)
    return rows


def throughput(bench: Bench, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Tokens per second, share of the bare forward pass, and the share of a large matrix product's speed (MFU)."""
    tokens = sum(map(len, bench.rows))
    head = bench.model.vocab_size * bench.model.d_model
    weights = sum(p.numel() for p in bench.model.hf.parameters()) - 2 * head  # no embedding, no head
    attention = sum(2 * bench.model.n_layers * len(row) ** 2 * bench.model.d_model for row in bench.rows)  # causal half
    flops = 2 * weights * tokens + attention
    bench.ours()
    seconds = statistics.median(timed(bench.ours, device) for _ in range(3))
    bare = statistics.median(timed(bench.base_forward, device) for _ in range(3))
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn((n, n), device=device, dtype=dtype)
    a @ a
    peak = 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(5))
    return {
        "tokens_per_second": tokens / seconds,
        "share_of_bare_forward": bare / seconds,
        "model_tflops": flops / seconds / 1e12,
        "matmul_tflops": peak / 1e12,
        "mfu": flops / seconds / peak,
    }


@torch.no_grad()
def run(shape: str, device: str, n: int, pairs: int, peers: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model(shape, device, dtype)
    rows = ragged_prompts(n, model.vocab_size)
    bench, place = Bench(model, rows, peers), model.device
    half = list(range(model.n_layers // 2))
    table = [
        ratio("all layers / plain forward padded to the longest", bench.ours,
              lambda: bench.forward(bench.to_longest), pairs, place, 0.50, True),
        ratio("all layers / base-model forward of the same batches", bench.ours,
              bench.base_forward, 2 * pairs - 1, place, 1.02, True),
        ratio("half depth / full depth", lambda: bench.ours(half), bench.ours, pairs, place, 0.60, True),
        ratio("to a store on disk / kept in memory", bench.to_disk, bench.ours, pairs, place, None, True),
    ]  # fmt: skip
    if peers:
        contests: list[tuple[str, Callable[[Any], Any], float]] = [
            ("TransformerLens, filtered", bench.transformer_lens, 2.3),
            ("nnsight", bench.nnsight, 1.9),
            ("output_hidden_states", bench.hidden_states, 1.9),
        ]
        for name, theirs, bar in contests:
            table.append(
                ratio(f"{name} / all layers, natural batching", lambda f=theirs: f(bench.to_longest),  # type: ignore[misc]
                      bench.ours, pairs, place, bar, False)
            )  # fmt: skip
            table.append(
                ratio(f"{name} / all layers, batches of 8 padded to their own longest",
                      lambda f=theirs: f(bench.to_batch), bench.ours, pairs, place, None, False)  # type: ignore[misc]
            )  # fmt: skip
    table += memory_rows(bench, place)
    slots = {"padded to the longest": sum(b["input_ids"].numel() for b in bench.to_longest)}
    slots |= {"sorted, token budget": sum(b["input_ids"].numel() for b in bench.sorted), "tokens": sum(map(len, rows))}
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name() if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": n,
        "pairs": pairs,
        "slots": slots,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens", "nnsight")}
        | {"python": platform.python_version()},
        "table": [asdict(row) | {"verdict": row.verdict} for row in table],
        "throughput": throughput(bench, place, dtype),
    }


def markdown(found: dict[str, Any]) -> str:
    """The table as ``docs/performance.md`` shows it."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    slots = ", ".join(f"{name} {count}" for name, count in found["slots"].items())
    lines = [
        f"{found['shape']}, {found['dtype']}, {found['device']}; {found['prompts']} prompts of 40-400 tokens "
        f"({slots}); median of {found['pairs']} interleaved pairs [second lowest, second highest]; {versions}.",
        "",
        "| ratio | measured | bar |",
        "|---|---|---|",
    ]
    for row in found["table"]:
        lines.append(f"| {row['name']} | {row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}] | {row['verdict']} |")
    speed = found["throughput"]
    lines += [
        "",
        f"{speed['tokens_per_second']:.0f} tokens/s, {speed['share_of_bare_forward']:.2f} of the bare base-model "
        f"forward pass of the same batches, {speed['model_tflops']:.3g} TFLOP/s: MFU {speed['mfu']:.2f} of a large "
        f"matrix product on this device ({speed['matmul_tflops']:.3g} TFLOP/s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=None, help="default: the 8B shape on a GPU, else the small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=None, help="default: 24 on a CPU, 256 on a GPU")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    parser.add_argument("--docs", type=Path, default=None, help="Markdown file whose marked part is replaced")
    options = parser.parse_args()
    gpu = options.device.startswith("cuda")
    shape = options.shape or ("llama-3.1-8b" if gpu else "llama-8x512")
    found = run(shape, options.device, options.prompts or (256 if gpu else 24), options.pairs, not options.no_peers)
    print(markdown(found))
    if options.out:
        write_json(options.out, found)
    if options.docs:
        text = options.docs.read_text()
        head, _, rest = text.partition(BEGIN)
        atomic_write(options.docs, f"{head}{BEGIN}\n\n{markdown(found)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
