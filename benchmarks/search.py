"""Many prefixes for few prompts: shared prefill against what else there is, on the same rows.

    python -m benchmarks.search [--model FOLDER] [--tasks 3] [--candidates 8] [--new-tokens 12] [--continuous]

Arms: plain batched ``generate`` (every row reads its whole prompt), one prefill with an expanded cache (a copy of the
prompt's cache per row), cascade attention (:mod:`pingscope.interp.generate.shared_prompts`), and transformers' own
continuous batching with shared blocks (``generate_batch``). Rows are natural tasks with prefixes of PING's phrase
generator; an arm keeps nothing from an earlier round, and its answers are compared token for token.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
from collections.abc import Callable
from typing import Literal

import torch
import transformers

from benchmarks.subject import lengths, natural_records, spelled, subject_of, subject_options
from benchmarks.timing import Table, circumstances, publish, ratio, turns
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.generate.generation import end_ids, generate
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.phrases import PhraseGenerator

Ids = list[tuple[int, ...]]
PLAIN, EXPANDED, CASCADE, CONTINUOUS = "plain generate", "expanded cache", "cascade", "continuous batching"


def candidate_rows(model: HookedModel, tasks: int, candidates: int) -> list[Rendered]:
    """Every task's prompt with every prefix."""
    prefixes = PhraseGenerator()([], candidates, random.Random(0))
    return [model.render(record.prompt(), prefix=prefix) for record in natural_records(tasks) for prefix in prefixes]


def plain(model: HookedModel, rows: list[Rendered], new_tokens: int) -> Ids:
    return [answer.ids for answer in generate(model, rows, max_new_tokens=new_tokens)]


def shared(model: HookedModel, rows: list[Rendered], new_tokens: int, sharing: Literal["cascade", "expanded"]) -> Ids:
    engine = SharedPrefill(model, sharing=sharing)
    return [answer.ids for answer in engine.generate(rows, max_new_tokens=new_tokens)]


def continuous(model: HookedModel, rows: list[Rendered], new_tokens: int) -> Ids:
    """transformers' engine; end tokens are cut off, as ours does."""
    ends = end_ids(model)
    settings = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends or -1, pad_token_id=model.pad_id
    )
    with contextlib.redirect_stderr(io.StringIO()):
        made = model.hf.generate_batch([list(row.ids) for row in rows], generation_config=settings)
    by_prompt = {
        tuple(out.prompt_ids): tuple(t for t in out.generated_tokens if t not in ends) for out in made.values()
    }
    return [by_prompt[row.ids] for row in rows]


def runnable(arms: dict[str, Callable[[], Ids]]) -> dict[str, Ids]:
    """Answers of every arm, each run once; one that does not run here is said on standard error and left out."""
    said: dict[str, Ids] = {}
    for name, arm in arms.items():
        try:
            said[name] = arm()
        except Exception as error:  # noqa: BLE001 - whatever another engine raises is reported, and the rest is timed
            why = " ".join(str(error).split())[:160]
            print(f"{name}: does not run here ({type(error).__name__}: {why})", file=sys.stderr)
    return said


@torch.no_grad()
def measure(
    model: HookedModel, tasks: int, candidates: int, new_tokens: int, rounds: int, other_engine: bool = False
) -> Table:
    """All arms on ``tasks`` x ``candidates`` rows.

    Raises:
        RuntimeError: cascade attention or plain generation does not run on this model.
    """
    rows = candidate_rows(model, tasks, candidates)
    arms: dict[str, Callable[[], Ids]] = {
        PLAIN: lambda: plain(model, rows, new_tokens),
        EXPANDED: lambda: shared(model, rows, new_tokens, "expanded"),
        CASCADE: lambda: shared(model, rows, new_tokens, "cascade"),
    }
    if other_engine:
        arms[CONTINUOUS] = lambda: continuous(model, rows, new_tokens)
    said = runnable(arms)
    if PLAIN not in said or CASCADE not in said:
        raise RuntimeError(f"{model.name}: shared prefill does not run, so there is nothing to compare")
    seconds = turns([{name: arms[name] for name in said}] * rounds, model.device, warm=False)
    table = [
        ratio(f"{name} / {CASCADE}", seconds[name], seconds[CASCADE], 1.0, False) for name in said if name != CASCADE
    ]
    same = ", ".join(
        f"{name} {sum(map(tuple.__eq__, ids, said[PLAIN]))} of {len(rows)}"
        for name, ids in said.items()
        if name != PLAIN
    )
    caption = (
        f"{spelled(model)}; {tasks} tasks x {candidates} prefixes: {lengths(rows)}, {new_tokens} new tokens each; "
        f"{rounds} rounds; {circumstances(model.device)}."
    )
    return Table(caption, table, [f"Answers that are those of {PLAIN}, token for token: {same}."])


def main() -> None:
    parser = subject_options(__doc__)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--continuous", action="store_true", help="time generate_batch too (slow without a GPU)")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    model = subject_of(given).load()
    table = measure(model, given.tasks, given.candidates, given.new_tokens, given.rounds, given.continuous)
    publish(table, f"benchmarks.search {given.dtype}", given.docs)


if __name__ == "__main__":
    main()
