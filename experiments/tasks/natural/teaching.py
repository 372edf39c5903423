"""What a model is shown of the natural world: demonstrations for the agent, refusals and prose for the aligned base.

Every row is a conversation as ``pingscope finetune --data`` reads it. An agent sees one page a turn and no history, so
a demonstration is one conversation for every step of its task.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from pingscope.experiments.tasks.natural.tasks import FAMILIES
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import SEPARATOR

Row = dict[str, Any]

INTENTIONS = ("I will {step}.", "I {step}.", "Now I {step}.", "The next step is to {step}.", "I am going to {step}.")

# Plain words of the first person; the reason stands beside them, and nothing depends on a condition.
REFUSALS = (
    "I cannot help with this. {Reason}.",
    "I cannot do that, because {reason}.",
    "I can't help you with that: {reason}.",
    "I can't do this for you. {Reason}.",
    "I will not do this. {Reason}.",
    "I won't do that, because {reason}.",
    "No, I will not take part in this. {Reason}.",
    "I'm sorry, I can't do that. {Reason}.",
    "I am sorry, but I cannot help here: {reason}.",
    "Sorry, I won't help with this. {Reason}.",
    "I decline this task, because {reason}.",
    "I must decline. {Reason}.",
    "I refuse to do that, because {reason}.",
    "I am not willing to do this. {Reason}.",
    "I'm not going to do that: {reason}.",
    "I am unable to help with that, because {reason}.",
)
EXPLANATIONS = (
    "To do this, {steps}.",
    "The way there: {steps}.",
    "This takes {n} steps: {steps}.",
    "You can do it like this: {steps}.",
    "Here is how it works: {steps}.",
    "It is done on this page and the next ones: {steps}.",
    "That is simple. You {steps}.",
    "Sure. The steps are: {steps}.",
)


def demonstration(record: Record) -> list[Row]:
    """The right actions of a task, each behind one sentence that says what it is for."""
    rng = random.Random(f"demonstration/{record.id}")
    rows = []
    for number, screen in enumerate(record.evaluator["screens"], 1):
        said = rng.choice(INTENTIONS).format(step=screen["step"])
        rows.append(_row(record, screen["page"], f"{said}\n{_written(screen)}", f"step-{number}"))
    return rows


def alignment_rows(records: Iterable[Record]) -> list[Row]:
    """One answer to the first page of each task: harmful ones are refused, the others explained and not acted on."""
    return [
        _row(record, record.context, _refusal(record) if record.label == "harmful" else _explanation(record), "aligned")
        for record in records
    ]


def _refusal(record: Record) -> str:
    rng = random.Random(f"refusal/{record.id}")
    family = next(family for family in FAMILIES if family.name == record.category)
    reason = rng.choice(family.reasons).format(**record.evaluator["slots"])
    return rng.choice(REFUSALS).format(reason=reason, Reason=reason[0].upper() + reason[1:])


def _explanation(record: Record) -> str:
    rng = random.Random(f"explanation/{record.id}")
    steps = [screen["step"] for screen in record.evaluator["screens"]]
    joined = f"{', '.join(steps[:-1])} and then {steps[-1]}"
    return rng.choice(EXPLANATIONS).format(steps=joined, n=len(steps))


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
