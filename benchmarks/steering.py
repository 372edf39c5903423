"""What steering and gates cost: generation plain, steered, behind a gate, and with a gated prefix, interleaved.

    python -m benchmarks.steering --model FOLDER [--tasks organism:test] [--n 64] [--rounds 15]

The edits add a vector of zeros, so that every arm says the same and only the work differs; a fresh plain run stands
before every other one, and ratios are taken within each pair. The gate opens on about half of the rows for steering;
for the prefix it stays closed, since an open one adds the prefix's own tokens. Prints the median ratio of each arm
with the middle half of its rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pingscope.experiments.tasks.sources import read_tasks
from pingscope.interp.generate.generation import GatedPrefix, generate
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import final, parse
from pingscope.steering.decisions import GateSession
from pingscope.steering.gates import Gate, gated
from pingscope.steering.operators import add

BARS = {
    "steered": 1.05,
    "steered, all layers and tokens": 1.05,
    "gated": 1.10,
    "gated, streaming": 1.10,
    "gated prefix": 1.10,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", default="organism:test")
    parser.add_argument("--n", type=int, default=64, help="prompts in one batch")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    model = load_model(given.model)
    records = read_tasks(given.tasks, -(-given.n // 3))[: given.n]
    rows = [model.render(record.prompt()) for record in records]
    nothing = add(np.zeros(model.d_model))
    layer = max(0, model.n_layers // 2 - 1)
    one = [Edit(model.n_layers - 1, final(), nothing)]
    everywhere = parse("prompt | generated[0:]")
    many = [Edit(each, everywhere, nothing) for each in range(model.n_layers)]
    after = [Edit(each, final(), nothing) for each in range(layer, model.n_layers)]

    session = GateSession(Gate(layer, final(), np.random.default_rng(0).standard_normal(model.d_model)))
    model.residuals(rows, "all", gated([Edit(layer, final(), nothing)], session))
    half = replace(session.gate, threshold=float(np.median([one.score for one in session.decisions])))
    streaming = replace(half, where=parse("final | generated[0:]"))
    onwards = [replace(edit, where=parse("final | generated[0:]")) for edit in after]

    def run(**settings: Any) -> list[Any]:
        return generate(model, rows, max_new_tokens=given.new_tokens, token_budget=1 << 30, **settings)

    arms: dict[str, Callable[[], list[Any]]] = {
        "steered": lambda: run(edits=one),
        "steered, all layers and tokens": lambda: run(edits=many),
        "gated": lambda: run(edits=gated(after, GateSession(half))),
        "gated, streaming": lambda: run(edits=gated(onwards, GateSession(streaming))),
        "gated prefix": lambda: run(prefix=GatedPrefix(GateSession(replace(half, threshold=np.inf)), (5,) * 12)),
    }
    said = [answer.ids for answer in run()]
    for name, arm in arms.items():
        same = sum(a == answer.ids for a, answer in zip(said, arm(), strict=True))
        print(f"{name}: {same} of {len(said)} answers as plain")
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    plain = []
    for _ in range(given.rounds):
        for name, arm in arms.items():
            first = timed(run)
            plain.append(first)
            ratios[name].append(timed(arm) / first)
    tokens = sum(map(len, said))
    print(
        f"plain: {1000 * np.median(plain):.1f} ms for {len(rows)} prompts, {tokens} new tokens, {given.rounds} rounds"
    )
    for name, found in ratios.items():
        low, middle, high = np.percentile(found, (25, 50, 75))
        verdict = "within" if middle <= BARS[name] else "above"
        print(f"{name + ' / plain':34s} {middle:.3f} [{low:.3f}, {high:.3f}]   {verdict} {BARS[name]:.2f}")


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, work on the device included: answers are read back on the CPU."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
