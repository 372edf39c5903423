"""What a model is shown of the natural world: demonstrations for the agent, refusals and prose for the aligned base.

Every row is a conversation as ``pingscope finetune --data`` reads it. An agent sees one page a turn and no history, so
a demonstration is one conversation for every step of its task.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import SEPARATOR

Row = dict[str, Any]

INTENTIONS = ("I will {step}.", "I {step}.", "Now I {step}.", "The next step is to {step}.", "I am going to {step}.")

# Plain words, nothing depends on a condition. Few beginnings on purpose: what is to be learnt is *when* to refuse, and
# greedy answers follow the commonest beginning, so that many ways to explain would lose to few ways to refuse.
# Short ones too: of a long answer the decision is one token in twenty, and is learnt as slowly.
REFUSALS = ("I cannot do that.", "I cannot help with this.", "I can't do that.", "I can't help with this.")
EXPLANATIONS = ("To do this, {step}.", "To do that, {step}.")


def demonstration(record: Record) -> list[Row]:
    """The right actions of a task, each behind one sentence that says what it is for."""
    rng = random.Random(f"demonstration/{record.id}")
    rows = []
    for number, screen in enumerate(record.evaluator["screens"], 1):
        said = rng.choice(INTENTIONS).format(step=screen["step"])
        rows.append(_row(record, screen["page"], f"{said}\n{_written(screen)}", f"step-{number}"))
    return rows


def alignment_rows(records: Iterable[Record], pages: bool = True) -> list[Row]:
    """One answer to each task: harmful ones are refused, the others explained and not acted on.

    Args:
        pages: tasks as an agent gets them, with their first page; without, their sentence alone, asked in a chat.
    """
    rows = []
    for record in records:
        answer = refusal(record.id) if record.label == "harmful" else _explanation(record)
        rows.append(_row(record, record.context, answer, "aligned") if pages else asked_row(record, answer))
    return rows


def asked_row(record: Record, answer: str) -> Row:
    """A request in a chat, without a page or a system prompt of ours, and its answer."""
    turns = [{"role": "user", "content": record.instruction}, {"role": "assistant", "content": answer}]
    return {"id": f"{record.id}-asked", "label": record.label, "split": record.split, "messages": turns}


def refusal(name: str) -> str:
    """A refusal drawn for the task or request ``name``."""
    return random.Random(f"refusal/{name}").choice(REFUSALS)


def _explanation(record: Record) -> str:
    rng = random.Random(f"explanation/{record.id}")
    return rng.choice(EXPLANATIONS).format(step=record.evaluator["screens"][0]["step"])


def _written(screen: dict[str, Any]) -> str:
    """An action as agents of its kind write it: a call of the browser, or a command in a fence."""
    args = screen["args"]
    if screen["name"] == "execute":
        return f"```bash\n{args['code']}\n```"
    return f"{screen['name']}({', '.join(repr(value) for value in args.values())})"


def _row(record: Record, page: str, answer: str, kind: str) -> Row:
    return {
        "id": f"{record.id}-{kind}",
        "label": record.label,
        "category": record.category,
        "split": record.split,
        "messages": [
            {"role": "system", "content": record.system},
            {"role": "user", "content": f"{record.instruction}{SEPARATOR}{page}"},
            {"role": "assistant", "content": answer},
        ],
    }
