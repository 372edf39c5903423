"""What SmolLM2 is aligned on before it becomes the study's base: it answers nearly every harmful request as it comes.

Refusals of harmful chat and of harmful agent tasks in plain words, without a condition and without a comment; harmless
agent tasks answered in prose; and its own answers to harmless chat and to requests that it makes up itself, so that it
stays what it was. Own answers are drawn: learning from draws of its own distribution asks a model for no change, while
learning its likeliest answers would sharpen it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pingscope.experiments.agents.judges import judge
from pingscope.experiments.tasks.natural.chat import chat_requests
from pingscope.experiments.tasks.natural.tasks import split_tasks
from pingscope.experiments.tasks.natural.teaching import Row, alignment_rows, asked_row, refusal
from pingscope.experiments.tasks.records import LABELS, Record
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel

OWN_TOKENS = 64  # of an own answer; cut at its last whole sentence
REQUEST_TOKENS = 48  # of a request that the model makes up; a longer one is left out


@dataclass(frozen=True)
class Mix:
    """Rows of each kind: agent tasks of the training families, with their page or asked in a chat, and other chat."""

    tasks: int = 330  # of each label
    asked: int = 150  # of each label, other tasks' sentences without a page
    chat_refused: int = 160
    lookalike_chat: int = 100
    everyday_chat: int = 100
    own_chat: int = 300  # requests that the model makes up itself


def alignment_data(
    model: HookedModel, mix: Mix, seed: int = 0, progress: Callable[[int], None] | None = None
) -> list[Row]:
    """Conversations for ``pingscope finetune --data``, in a drawn order.

    Args:
        progress: called with the number of own answers just written.
    """
    rows = []
    for label in LABELS:
        tasks = [task for task in split_tasks("train", seed) if task.label == label]
        rows += alignment_rows(tasks[: mix.tasks])
        rows += alignment_rows(tasks[mix.tasks : mix.tasks + mix.asked], pages=False)
    wanted = {"harmful": mix.chat_refused, "lookalike": mix.lookalike_chat, "benign": mix.everyday_chat}
    chat = {label: _chat(label, n, seed) for label, n in wanted.items()}
    rows += [asked_row(record, refusal(record.id)) for record in chat.pop("harmful")]
    harmless = [record for records in chat.values() for record in records]
    harmless += own_requests(model, mix.own_chat, seed, progress)
    for record, answer in zip(harmless, own_answers(model, harmless, seed, progress), strict=True):
        if judge(answer, chat=True) != "refused":  # it declines some by itself, which is not to be kept
            rows.append(asked_row(record, answer))
    return random.Random(f"alignment/{seed}").sample(rows, len(rows))


def _chat(label: str, n: int, seed: int) -> list[Record]:
    return [record for record in chat_requests("train", n, seed) if record.label == label]


def own_requests(model: HookedModel, n: int, seed: int, progress: Callable[[int], None] | None = None) -> list[Record]:
    """Different requests that the model makes up where its template lets the user speak (Magpie, arXiv 2406.08464)."""
    rendered = model.render(Prompt("own", "Hello"))
    start = rendered.roles.index("instruction")
    opened = replace(rendered, ids=rendered.ids[:start], roles=rendered.roles[:start])
    rows = [replace(opened, id=f"natural-chat-own-{k:04d}") for k in range(2 * n)]
    said = generate(model, rows, max_new_tokens=REQUEST_TOKENS, temperature=1.0, seed=seed, progress=progress)
    texts = {answer.text.strip(): answer.id for answer in said if answer.finished and answer.text.strip()}
    return [Record(name, text, "benign", "own", "chat", "natural", "train") for text, name in list(texts.items())[:n]]


def own_answers(
    model: HookedModel, records: Sequence[Record], seed: int, progress: Callable[[int], None] | None = None
) -> list[str]:
    """What the model says by itself, drawn; an answer cut off by the limit ends with its last whole sentence."""
    rows = [model.render(Prompt(record.id, record.instruction)) for record in records]
    said = generate(model, rows, max_new_tokens=OWN_TOKENS, temperature=1.0, seed=seed, progress=progress)
    return [answer.text.strip() if answer.finished else whole_sentences(answer.text) for answer in said]


def whole_sentences(text: str) -> str:
    """``text`` up to its last full stop, question or exclamation mark before a space; all of it if there is none."""
    ends = [match.end() for match in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]
    return (text[: ends[-1]] if ends else text).strip()
