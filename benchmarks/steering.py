"""What steering and gates cost: generation plain, steered, behind a gate, and with a gated prefix.

    python -m benchmarks.steering [--model FOLDER] [--n 8] [--new-tokens 16] [--rounds 7]

The edits add a vector of zeros, so that every arm says the same and only the work differs. The gate opens on about half
of the rows for steering; for the prefix it stays closed, since an open one adds the prefix's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.subject import lengths, natural_prompts, spelled, subject_of, subject_options
from benchmarks.timing import Table, circumstances, publish, ratio, turns
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.generate.generation import GatedPrefix, Generation, generate
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import final, parse
from pingscope.steering.decisions import GateSession
from pingscope.steering.gates import Gate, gated
from pingscope.steering.operators import add

PLAIN = "plain"
BARS = {
    "steered": 1.05,
    "steered, all layers and tokens": 1.05,
    "gated": 1.10,
    "gated, streaming": 1.10,
    "gated prefix": 1.10,
}

Arm = Callable[[], list[Generation]]


def arms_of(model: HookedModel, rows: list[Rendered], new_tokens: int) -> dict[str, Arm]:
    """Plain generation, and an arm of each name in :data:`BARS`."""
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
    closed = replace(half, threshold=np.inf)

    def run(**settings: Any) -> list[Generation]:
        return generate(model, rows, max_new_tokens=new_tokens, token_budget=1 << 30, **settings)

    return {
        PLAIN: run,
        "steered": lambda: run(edits=one),
        "steered, all layers and tokens": lambda: run(edits=many),
        "gated": lambda: run(edits=gated(after, GateSession(half))),
        "gated, streaming": lambda: run(edits=gated(onwards, GateSession(streaming))),
        "gated prefix": lambda: run(prefix=GatedPrefix(GateSession(closed), (5,) * 12)),
    }


def measure(model: HookedModel, n: int, new_tokens: int, rounds: int) -> Table:
    """All arms on one batch of ``n`` natural prompts."""
    rows = natural_prompts(model, n)
    arms = arms_of(model, rows, new_tokens)
    said = {name: [answer.ids for answer in arm()] for name, arm in arms.items()}
    seconds = turns([arms] * rounds, model.device, warm=False)
    table = [ratio(f"{name} / {PLAIN}", seconds[name], seconds[PLAIN], bar) for name, bar in BARS.items()]
    same = ", ".join(f"{name} {sum(map(tuple.__eq__, said[name], said[PLAIN]))}" for name in BARS)
    caption = (
        f"{spelled(model)}; {lengths(rows)} in one batch, {sum(map(len, said[PLAIN]))} new tokens; {rounds} rounds; "
        f"{circumstances(model.device)}."
    )
    return Table(caption, table, [f"Answers as plain, of {n}: {same}."])


def main() -> None:
    parser = subject_options(__doc__)
    parser.add_argument("--n", type=int, default=8, help="prompts in one batch")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    table = measure(subject_of(given).load(), given.n, given.new_tokens, given.rounds)
    publish(table, f"benchmarks.steering {given.dtype}", given.docs)


if __name__ == "__main__":
    main()
