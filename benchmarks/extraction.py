"""Extraction against the bare forward pass and against peers, on natural prompts.

    python -m benchmarks.extraction [--model FOLDER] [--dtype bfloat16] [--prompts 12] [--rounds 5]

*Padded plain forward* is what tokenising a list with ``padding=True`` and calling the model gives: one batch, every
prompt padded to the longest, the head at every position. The peers get that batch too.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import lengths, natural_prompts, spelled, subject_of, subject_options
from benchmarks.timing import Ratio, Table, Work, circumstances, publish, ratio, single, timed, turns
from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.store.extraction import extract

PEERS = ("TransformerLens", "nnsight", "output_hidden_states")


class Contest:
    """The competitors, each a function without arguments that reads the same residuals of the same prompts."""

    def __init__(self, model: HookedModel, rows: list[Rendered], peers: bool) -> None:
        self.model, self.rows = model, rows
        self.to_longest = model.inputs(model.batch(rows))
        orders = token_budget_batches([len(row) for row in rows], model.token_budget)
        self.sorted = [model.inputs(model.batch([rows[i] for i in order])) for order in orders]
        self.bridge = self.traced = None
        if peers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.bridge = load_model(model, backend="transformer_lens").bridge  # type: ignore[attr-defined]
                self.traced = load_model(model, backend="nnsight").traced  # type: ignore[attr-defined]

    def arms(self) -> dict[str, Work]:
        found: dict[str, Work] = {
            "all layers": self.ours,
            "half depth": lambda: self.model.residuals(self.rows, list(range(self.model.n_layers // 2))),
            "store": self.to_disk,
            "bare": self.bare,
            "padded": lambda: self.model.hf(**self.to_longest),
        }
        if self.bridge is not None:
            found |= dict(zip(PEERS, (self.transformer_lens, self.nnsight, self.hidden_states), strict=True))
        return found

    def ours(self) -> Any:
        return self.model.residuals(self.rows, "all")

    def bare(self) -> None:
        """The base model on our batches, with nothing kept: the floor."""
        for given in self.sorted:
            self.model.base(**given)

    def to_disk(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kind = str(self.model.hf.dtype).removeprefix("torch.")
            extract(self.model, self.rows, Path(folder) / "store", dtype=kind)

    def hidden_states(self) -> Any:
        return self.model.hf(**self.to_longest, output_hidden_states=True).hidden_states

    def transformer_lens(self) -> Any:
        assert self.bridge is not None
        given = {name: value for name, value in self.to_longest.items() if name not in ("input_ids", "use_cache")}
        names = [f"blocks.{l}.hook_out" for l in range(self.model.n_layers)]
        return self.bridge.run_with_cache(self.to_longest["input_ids"], names_filter=names, return_type=None, **given)[
            1
        ]

    def nnsight(self) -> Any:
        import nnsight

        assert self.traced is not None
        traced, layers = self.traced, range(self.model.n_layers)
        given = {name: value for name, value in self.to_longest.items() if name != "use_cache"}
        with traced.trace(given, use_cache=False):
            kept = nnsight.save([traced.model.layers[l].output for l in layers])
        return kept


def peak_extra(work: Work, device: torch.device) -> float:
    """Bytes above what was held before, at the peak of a run; on the CPU by the kernel's count (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory(contest: Contest) -> list[Ratio]:
    """Peaks of a store on disk of all and of half of the prompts, and against TransformerLens' filtered cache."""
    device = contest.model.device
    longest = max(contest.rows, key=len)  # among the fewer too, or their largest batch would differ
    others = [row for row in contest.rows if row.id != longest.id]
    half = Contest(contest.model, [longest, *others[: len(contest.rows) // 2 - 1]], peers=False)
    ours, fewer = peak_extra(contest.to_disk, device), peak_extra(half.to_disk, device)
    rows = [single("peak extra memory of a store, all prompts / half of them", ours / max(fewer, 1))]
    if contest.bridge is not None:
        theirs = peak_extra(contest.transformer_lens, device)
        rows.append(
            single("peak extra memory of a store / TransformerLens' filtered cache", ours / max(theirs, 1), 0.4)
        )
    return rows


def forward_flops(model: HookedModel, rows: Sequence[Rendered]) -> float:
    """Operations of reading ``rows`` without the head: two a weight and token, and the causal half of attention.

    Norms, activations and padding are not counted (the convention of PaLM's model FLOPs utilisation).
    """
    weights = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    attention = sum(2 * model.n_layers * len(row) ** 2 * model.n_heads * model.head_dim for row in rows)
    return 2.0 * weights * sum(map(len, rows)) + attention


def matmul_speed(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Operations a second of a large matrix product, best of five: what this device does at its best."""
    a = torch.randn((n, n), device=device, dtype=dtype)
    a @ a
    return 2 * n**3 / min(timed(lambda: a @ a, device) for _ in range(5))


@torch.no_grad()
def measure(model: HookedModel, n: int, rounds: int, peers: bool = True) -> Table:
    """All arms on ``n`` natural prompts."""
    rows, device = natural_prompts(model, n), model.device
    contest = Contest(model, rows, peers)
    seconds = turns([contest.arms()] * rounds, device)
    ours = seconds["all layers"]
    table = [
        ratio("all layers / padded plain forward", ours, seconds["padded"]),
        ratio("all layers / base-model forward of the same batches", ours, seconds["bare"], 1.02),
        ratio("half depth / full depth", seconds["half depth"], ours, 0.6),
        ratio("to a store on disk / kept in memory", seconds["store"], ours),
        *(ratio(f"{peer} / all layers", seconds[peer], ours, 1.0, False) for peer in PEERS if peers),
        *memory(contest),
    ]
    took, flops = statistics.median(ours), forward_flops(model, rows)
    best = matmul_speed(device, model.hf.dtype, 8192 if device.type == "cuda" else 1024)
    slots = sum(given["input_ids"].numel() for given in contest.sorted)
    caption = (
        f"{spelled(model)}; {lengths(rows)}, {contest.to_longest['input_ids'].numel()} slots padded to the longest, "
        f"{slots} in our batches; {rounds} rounds; {circumstances(device)}."
    )
    speed = (
        f"{sum(map(len, rows)) / took:.0f} tokens/s, {flops / took / 1e12:.3g} TFLOP/s: MFU {flops / took / best:.2f} "
        f"of a large matrix product on this device ({best / 1e12:.3g} TFLOP/s)."
    )
    return Table(caption, table, [speed])


def main() -> None:
    parser = subject_options(__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    table = measure(subject_of(given).load(), given.prompts, given.rounds, not given.no_peers)
    publish(table, f"benchmarks.extraction {given.dtype}", given.docs)


if __name__ == "__main__":
    main()
