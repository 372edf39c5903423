"""Many prefixes for few prompts: shared prefill against what else there is, on the same rows, interleaved.

    python -m benchmarks.search [--tasks 14] [--together 7] [--candidates 100] [--new-tokens 30] [--d-model 256]

A search asks for many tasks at once, so each arm gets ``--together`` tasks and batches them as it does in use. Arms, in
turn: plain batched ``generate`` (every row reads its whole prompt), prefill once with an expanded
cache (a copy of the prompt's cache per row), cascade attention (``pingscope.interp.generate.shared_prompts``), and
transformers' own
continuous batching with shared blocks (``generate_batch``). A random Llama, float32: prompts of 280 to 340 tokens,
prefixes of 4 to 16, exactly ``--new-tokens`` each. The default shape (5 M parameters, 4 layers of width 256) is one at
which attention, feed-forward and Python all matter on two CPU cores; ids are compared token for token.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.generate.generation import generate
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.interp.model.hooked import HookedModel

Ids = list[tuple[int, ...]]


class Decoder(SimpleNamespace):
    """A tokenizer's place: the benchmark compares ids, and texts cost every arm the same."""

    pad_token_id = 0
    eos_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - nothing is added to it

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return ""


def build(d_model: int, layers: int, vocab: int = 4096, device: str = "cpu") -> HookedModel:
    """A random Llama with two query heads to a key head; no token ends an answer."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=layers,
        num_attention_heads=d_model // 64, num_key_value_heads=max(1, d_model // 128), max_position_embeddings=2048,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.06)
    hf.generation_config.eos_token_id = None
    return HookedModel(hf.to(device), Decoder(), name=f"llama {layers} x {d_model}")


def make_rows(model: HookedModel, tasks: int, candidates: int, seed: int = 0) -> list[list[Rendered]]:
    """By task: its prompt with every prefix."""
    rng = random.Random(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, model.vocab_size) for _ in range(n))

    system, prefixes = draw(240), [draw(rng.randint(4, 16)) for _ in range(candidates)]
    out = []
    for task in range(tasks):
        prompt = system + draw(rng.randint(40, 100))
        roles = ("instruction",) * len(prompt)
        out.append(
            [
                Rendered(f"{task}-{j}", "", prompt + prefix, roles + ("prefix",) * len(prefix))
                for j, prefix in enumerate(prefixes)
            ]
        )
    return out


def arms(model: HookedModel, new_tokens: int, continuous: bool) -> dict[str, Callable[[list[Rendered]], Ids]]:
    """What is timed; each starts without anything kept from earlier calls."""

    def plain(rows: list[Rendered]) -> Ids:
        return [g.ids for g in generate(model, rows, max_new_tokens=new_tokens)]

    def shared(sharing: Any) -> Callable[[list[Rendered]], Ids]:
        def run(rows: list[Rendered]) -> Ids:
            engine = SharedPrefill(model, sharing=sharing)
            return [g.ids for g in engine.generate(rows, max_new_tokens=new_tokens)]

        return run

    def batching(rows: list[Rendered]) -> Ids:
        settings = transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        with contextlib.redirect_stderr(io.StringIO()):
            made = model.hf.generate_batch([list(row.ids) for row in rows], generation_config=settings)
        by_prompt = {tuple(out.prompt_ids): tuple(out.generated_tokens) for out in made.values()}
        return [by_prompt[row.ids] for row in rows]

    found: dict[str, Callable[[list[Rendered]], Ids]] = {
        "plain generate": plain,
        "expanded cache": shared("expanded"),
        "cascade": shared("cascade"),
    }
    return found | ({"continuous batching": batching} if continuous else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=14)
    parser.add_argument("--together", type=int, default=7, help="tasks that an arm gets at once")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--continuous", type=int, default=0, help="task groups on which generate_batch is timed (slow without a GPU)"
    )
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    model = build(given.d_model, given.layers, device=given.device)
    by_task = make_rows(model, given.tasks, given.candidates)
    runs = arms(model, given.new_tokens, bool(given.continuous))
    print(
        f"{given.tasks} tasks ({given.together} at a time) x {given.candidates} candidates x {given.new_tokens} "
        f"tokens, {model.name}, {torch.get_num_threads()} threads, {given.device}",
        flush=True,
    )
    for name in list(runs):  # warm-up, and whether it runs here at all
        try:
            warm = runs[name](by_task[0][:2])
            if any(len(ids) != given.new_tokens for ids in warm):
                raise RuntimeError(f"gave {sorted({len(ids) for ids in warm})} tokens, not {given.new_tokens}")
        except Exception as error:  # noqa: BLE001 - what a foreign engine raises is reported, and the rest is timed
            print(f"{name}: does not run here ({type(error).__name__}: {' '.join(str(error).split())[:160]})")
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    same: dict[str, list[int]] = {name: [0, 0] for name in runs}
    groups = [by_task[i : i + given.together] for i in range(0, len(by_task), given.together)]
    for number, rows in enumerate([row for task in group for row in task] for group in groups):
        said: dict[str, Ids] = {}
        now = [name for name in runs if name != "continuous batching" or number < given.continuous]
        names = now if number % 2 == 0 else now[::-1]
        for name in names:
            if given.device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            said[name] = runs[name](rows)
            if given.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
        for name, ids in said.items():
            pairs = zip(ids, said["plain generate"], strict=True)
            same[name] = [same[name][0] + sum(a == b for a, b in pairs), same[name][1] + len(ids)]
        print(f"  group {number + 1}: " + ", ".join(f"{n} {seconds[n][-1]:.2f} s" for n in now), file=sys.stderr)
    if "cascade" not in runs:
        raise SystemExit("cascade does not run: nothing to compare")
    print(f"{'':22}{'seconds':>9}{'plain / this':>24}{'this / cascade':>24}   identical answers")
    for name, took in seconds.items():  # ratios are of the same group, median [least..largest]
        columns = "".join(
            f"{statistics.median(r):10.2f}x [{min(r):.2f}..{max(r):.2f}]".rjust(24)
            for r in (
                [a / b for a, b in zip(seconds["plain generate"], took, strict=False)],
                [a / b for a, b in zip(took, seconds["cascade"], strict=False)],
            )
        )
        print(f"{name:22}{sum(took):9.1f}{columns}   {same[name][0]}/{same[name][1]}")


if __name__ == "__main__":
    main()
