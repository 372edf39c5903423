"""Conversations as a model is trained on them: the very ids of its chat template, and which of them carry the loss.

What is trained is what the model would have to say itself: everything the template writes after its generation prompt,
up to the token that ends the turn. So a tuned model stops where the base stops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pingscope.interp.chat.messages import Conversation, Turn
from pingscope.interp.chat.template import QUOTED, Span, Template, shared_start, template_of
from pingscope.interp.errors import UserError

# Private characters, put into contents where they spell control tokens and found again in the rendering.
MARKS = [chr(code) for code in range(0xF8FF, 0xF8DF, -1)]
REMEDY = "mend that turn, or pass another template with --chat-template FILE (chat_template=)"


@dataclass(frozen=True)
class TrainingExample:
    """Token ids of a conversation up to one assistant turn; ``trained`` runs in parallel."""

    id: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


def training_examples(tokenizer_or_model: Any, conversation: Conversation) -> list[TrainingExample]:
    """One example for every assistant turn that is trained: the conversation up to it, as the template renders it.

    Templates show earlier turns differently from the last one (Qwen 3 cuts their thinking), so every turn is trained
    as it is said. ids equal ``apply_chat_template`` of the same messages, but for contents that spell control tokens:
    these stay text.

    Raises:
        UserError: the template refuses the conversation, or drops a part of it; names the turn and the remedy.
    """
    template = template_of(getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model))
    return [
        _example(template, conversation, number)
        for number, turn in enumerate(conversation.turns)
        if turn.role == "assistant" and turn.trained
    ]


def _example(template: Template, conversation: Conversation, number: int) -> TrainingExample:
    where = f"{conversation.id}: turn {number + 1}"
    if number == 0:
        raise UserError(f"{where} (assistant) answers nobody; put a user turn before it")
    template.skeleton(("user",))  # learns whether contents are text or lists of parts
    turns = conversation.turns[: number + 1]
    mark = next(m for m in MARKS if m not in conversation.tools + "".join(map(repr, turns)))
    marked = [_marked(template, turn, mark) for turn in turns]
    tools = _spelled_out(template, conversation.tools, mark)
    messages = [turn.message() for turn in marked]
    definitions = json.loads(tools) if tools else None
    try:
        asked = template.text(messages[:-1], definitions)
        said = template.text(messages, definitions, answer=False)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    _check_nothing_is_lost(said, marked, definitions, where)
    text, spans = _spans(said, _beginning(template, asked, said, messages, definitions), mark)
    ids, roles = template.tokenise(text, spans)
    trained = [role in ("header", "response") for role in roles]
    end = _end(template, ids, trained)
    if end is None:
        # Nothing ends the turn in this template; without an end the tuned model would never stop.
        return TrainingExample(f"{conversation.id}#{number}", (*ids, template.eos(where)), (*trained, True))
    trained[end + 1 :] = [False] * (len(ids) - end - 1)  # a line end behind the end of turn is the template's
    return TrainingExample(f"{conversation.id}#{number}", tuple(ids), tuple(trained))


def _beginning(template: Template, asked: str, said: str, messages: Sequence[dict[str, Any]], tools: Any) -> int:
    """Where in ``said`` the last turn begins: behind the generation prompt, as far as the template repeats it."""
    if said.startswith(asked):
        return len(asked)
    shared = shared_start(asked, said)
    # A prompt that opens thinking ("<think>") shares its first characters with an answer that begins with "<".
    turn = messages[-1]
    parts = [said.rfind(part.strip()) for part in (turn.get("reasoning_content", ""), turn["content"]) if part.strip()]
    first = min([len(said), *(place for place in parts if place >= 0)])
    # A template may set its header apart otherwise when it asks (two line ends there, one here).
    header = asked.removeprefix(template.text(messages[:-1], tools, answer=False)).strip()
    begun = said.rfind(header, min(shared, first), first) if header and asked.rstrip().endswith(header) else -1
    if begun < 0:
        return min(shared, first)
    begun += len(header)
    return begun + shared_start(asked[len(asked.rstrip()) :], said[begun:])


def _end(template: Template, ids: Sequence[int], trained: Sequence[bool]) -> int | None:
    """Index of the control token that ends the turn; only white space and further control tokens may follow it."""
    tail: list[int] = []
    for k in range(len(ids) - 1, -1, -1):
        special = template.is_special(ids[k])
        if not trained[k] or not (special or not template.decode(ids[k : k + 1]).strip()):
            break
        if special:
            tail.insert(0, k)
    # Some templates close the whole conversation too (Phi-3), or open the next turn: the model stops at its turn's end.
    ends = [k for k in range(len(ids)) if trained[k] and ids[k] == template.end_of_turn]
    own = next((k for k in tail if k in ends), ends[-1] if ends and template.opens_turns_unasked else None)
    return own if own is not None or not tail else tail[-1]


def _spans(said: str, begin: int, mark: str) -> tuple[str, list[Span]]:
    """The text without marks, and its characters' kinds.

    Up to ``begin`` the text is ``template``, behind it ``header``: markup both, so that real control tokens stay. The
    characters around a mark are text, ``QUOTED`` or the model's own ``response``, and never become control tokens.
    """
    text = said.replace(mark, "")
    begin -= said[:begin].count(mark)
    kinds = ["template"] * begin + ["header"] * (len(text) - begin)
    marks = (match.start() - number for number, match in enumerate(re.finditer(mark, said)))
    for place in marks:
        kinds[place - 1 : place + 1] = [QUOTED if place <= begin else "response"] * 2
    return text, [(k, k + 1, kind) for k, kind in enumerate(kinds)]


def _marked(template: Template, turn: Turn, mark: str) -> Turn:
    """The turn with a mark in every control token that its texts spell."""
    speech = turn.role == "assistant"
    calls = tuple(
        replace(call, arguments=_spelled_out(template, call.arguments, mark, speech)) for call in turn.tool_calls
    )
    return replace(
        turn,
        content=_mark(template, turn.content, mark, speech),
        reasoning=_mark(template, turn.reasoning, mark, speech),
        tool_calls=calls,
    )


def _spelled_out(template: Template, text: str, mark: str, speech: bool = False) -> str:
    """JSON with its characters unescaped, so that a control token in it is seen, and marked."""
    return _mark(template, json.dumps(json.loads(text), ensure_ascii=False), mark, speech) if text else ""


def _mark(template: Template, text: str, mark: str, speech: bool) -> str:
    for start, _ in sorted(template.spelled_in(text, speech=speech), reverse=True):
        text = text[: start + 1] + mark + text[start + 1 :]
    return text


def _check_nothing_is_lost(said: str, turns: Sequence[Turn], tools: Any, where: str) -> None:
    """Everything given stands in the rendering, in its order; thinking of earlier turns may be cut by design."""
    cursor = 0
    for number, turn in enumerate(turns, 1):
        here = f"{where.rpartition(' ')[0]} {number} ({turn.role})"
        for part in _parts(turn, last=number == len(turns)):
            # A template may put the first system message elsewhere (Mistral: before the last request).
            found = _find(said, part, 0 if turn.role == "system" and number == 1 else cursor)
            if found is None:
                raise UserError(f"{here}: the chat template drops or moves its content; {REMEDY}")
            cursor = max(cursor, found) if number > 1 or turn.role != "system" else cursor
        if number == len(turns) and turn.reasoning.strip() and _find(said, turn.reasoning, 0) is None:
            raise UserError(f"{here}: the chat template drops its reasoning; remove it, or {REMEDY}")
        for call in turn.tool_calls:
            leaves = [call.name, *_texts(json.loads(call.arguments))]
            if any(_find(said, leaf, 0) is None for leaf in leaves if leaf.strip()):
                raise UserError(f"{here}: the chat template drops the tool call {call.name!r}; {REMEDY}")
    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if name not in said:
            raise UserError(f"{where}: the chat template drops the definition of tool {name!r}; {REMEDY}")


def _parts(turn: Turn, last: bool) -> list[str]:
    """What of a turn's content must be found: thinking within it may stand apart, and be cut from earlier turns."""
    thought, mark, spoken = turn.content.rpartition("</think>")
    if turn.role != "assistant" or not mark:
        return [turn.content] if turn.content.strip() else []
    thought = thought.strip().removeprefix("<think>")
    return [part for part in (thought if last else "", spoken) if part.strip()]


def _find(said: str, text: str, cursor: int) -> int | None:
    """Where ``text`` ends in ``said`` from ``cursor`` on: as it is, trimmed, or as JSON writes it."""
    trimmed = text.strip()
    for shape in (text, trimmed, json.dumps(trimmed, ensure_ascii=False)[1:-1], json.dumps(trimmed)[1:-1]):
        start = said.find(shape, cursor)
        if start >= 0:
            return start + len(shape)
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every text within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
