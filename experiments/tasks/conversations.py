"""Files of demonstrations as conversations: role/content and ShareGPT turns, prompt and answer pairs, our own records.

Everything a row says is used or refused by name: reasoning, tool calls and their answers, tool definitions, and which
turns carry the loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pingscope.experiments.run.progress import say
from pingscope.experiments.tasks.rows import Row, Skipped, check_names, each, plain_text, read_rows, without_nulls
from pingscope.interp.chat.messages import SPEAKERS, Conversation, ToolCall, Turn
from pingscope.interp.errors import UserError
from pingscope.interp.files import parse_json

ROLES = {
    **{name: name for name in SPEAKERS},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
TURNS = ("messages", "conversations", "conversation", "dialog")
ASKED = ("user", "prompt", "instruction")
SAID = ("assistant", "completion", "response", "output", "answer")
ROW_FIELDS = (*TURNS, *ASKED, *SAID, "id", "system", "input", "context", "page", "tools", "functions")
# Facts about a row that change nothing of what is trained.
FACTS = ("label", "category", "domain", "source", "split", "pair_id", "evaluator", "dataset", "idx", "index", "type")
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_FIELDS = (
    "role", "from", "content", "value", *REASONING, "tool_calls", "function_call", "name", "tool_call_id", "loss",
    "weight", "train", "trainable",
)  # fmt: skip
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


def read_conversations(path: str | Path, skipped: Skipped | None = None) -> list[Conversation]:
    """Conversations of a file, one a row, each with at least one assistant turn that is trained.

    Args:
        skipped: takes the rows that are refused; without, the first one ends the reading.

    Raises:
        UserError: names file, line, turn and field.
    """
    unused: set[str] = set()

    def make(placed: tuple[str, Row]) -> list[Conversation]:
        conversation, unknown = conversation_of(*placed)
        unused.update(unknown)
        return [conversation]

    found = each(read_rows(path, skipped=skipped), make, skipped)
    if not found:
        left = f" ({len(skipped)} bad rows were skipped)" if skipped else ""
        raise UserError(f"{path}: holds no conversation{left}; write one a line")
    if unused:
        say(f"note: {path}: fields that nothing reads: {', '.join(sorted(unused))}")
    return found


def conversation_of(where: str, row: Row) -> tuple[Conversation, list[str]]:
    """One row as a conversation, and the names of its fields that say nothing about it."""
    row = without_nulls(row)
    unknown = [name for name in check_names(row, ROW_FIELDS, where) if name not in FACTS]
    name = next((name for name in TURNS if name in row), None)
    turns = _turns(row, name, where) if name else _pair(row, where)
    if row.get("system") and (not turns or turns[0].role != "system"):
        turns.insert(0, Turn("system", plain_text(row["system"], f"{where}: field 'system'")))
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise UserError(f"{where}: no assistant turn is trained; add one, or remove the row")
    tools = row.get("tools", row.get("functions"))
    return Conversation(str(row.get("id", where)), tuple(turns), _tools(tools, where)), unknown


def _turns(row: Row, name: str, where: str) -> list[Turn]:
    beside = [other for other in (*TURNS, *ASKED, *SAID, "input", "context", "page") if other in row and other != name]
    if beside:
        raise UserError(f"{where}: field '{beside[0]}' stands beside '{name}'; keep one of the two")
    given = row[name]
    if isinstance(given, str):
        given = parse_json(given, f"{where}: field '{name}'")
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: field '{name}' is missing or not a list of turns")
    return [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(given, 1)]


def _pair(row: Row, where: str) -> list[Turn]:
    """A row of one request and one answer; Alpaca's input, or a record's page, follows the request."""
    asked, said = (next((name for name in names if name in row), None) for names in (ASKED, SAID))
    if asked is None or said is None:
        raise UserError(
            f"{where}: field 'messages' (or 'conversations') is missing, and so is a pair such as prompt and completion"
        )
    if isinstance(row[asked], list) and all(isinstance(turn, dict) and "role" in turn for turn in row[asked]):
        turns = [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(row[asked], 1)]
        answer = row[said] if isinstance(row[said], list) else [{"role": "assistant", "content": row[said]}]
        return [*turns, *(_turn(turn, f"{where}: field '{said}'") for turn in answer)]
    parts = [row[name] for name in (asked, "input", "context", "page") if row.get(name)]
    request = "\n".join(plain_text(part, f"{where}: field '{asked}'") for part in parts)
    answer = plain_text(row[said], f"{where}: field '{said}'")
    for name, text in ((asked, request), (said, answer)):
        if not text.strip():
            raise UserError(f"{where}: field '{name}' is empty; give it a text, or remove the row")
    return [Turn("user", request), _with_thought(Turn("assistant", answer))]


def _turn(given: Any, where: str) -> Turn:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: is not an object with a role (system, user, assistant) and a text content")
    turn = without_nulls(dict(given))
    unknown = check_names(turn, TURN_FIELDS, where)
    if unknown:
        raise UserError(f"{where}: field '{unknown[0]}' is not known; remove it, or say it in the content")
    role = ROLES.get(str(turn.get("role", turn.get("from", ""))).lower())
    if role is None:
        shown = turn.get("role", turn.get("from"))
        raise UserError(f"{where}: role {shown!r} is not known; use one of {', '.join(SPEAKERS)}")
    content = turn.get("content", turn.get("value", ""))
    text = plain_text(content, f"{where}: field 'content'") if content != [] else ""
    calls = _calls(turn, where)
    if turn.get("from") == "function_call":
        calls, text = (*calls, _call(parse_json(text, f"{where}: field 'value'"), where)), ""
    reasoning = [plain_text(turn[name], f"{where}: field '{name}'") for name in REASONING if turn.get(name)]
    if (calls or reasoning) and role != "assistant":
        raise UserError(f"{where}: a {role} turn has no reasoning and no tool calls; give them to an assistant")
    if not text.strip() and not calls:
        raise UserError(f"{where}: field 'content' is missing or empty; give it a text, or remove the turn")
    made = Turn(
        role,  # type: ignore[arg-type]
        text,
        reasoning[0] if reasoning else "",
        calls,
        str(turn.get("name", "")) if role == "tool" else "",
        str(turn.get("tool_call_id", "")),
        _trained(turn, role, where),
    )
    return _with_thought(made) if role == "assistant" else made


def _with_thought(turn: Turn) -> Turn:
    """Thinking at the start of an answer, between tags, is reasoning."""
    found = _THOUGHT.match(turn.content)
    if not found or turn.reasoning or "<think>" in turn.content[found.end() :]:
        return turn
    rest = turn.content[found.end() :]
    return Turn(turn.role, rest, found[1], turn.tool_calls, turn.name, turn.call_id, turn.trained)


def _trained(turn: Row, role: str, where: str) -> bool:
    """Whether the turn carries a loss; weights between 0 and 1 are refused, since they would be rounded."""
    flags = [turn[name] for name in ("loss", "weight", "train", "trainable") if name in turn]
    for flag in flags:
        if flag not in (0, 1, True, False):
            raise UserError(f"{where}: loss {flag!r} is neither 0 nor 1; turns are trained or not")
    if role != "assistant" and any(flags):
        raise UserError(f"{where}: a {role} turn is never trained; remove its loss")
    return all(flags)


def _calls(turn: Row, where: str) -> tuple[ToolCall, ...]:
    given = turn.get("tool_calls") or []
    if isinstance(given, str):
        given = parse_json(given, f"{where}: field 'tool_calls'")
    if not isinstance(given, list):
        raise UserError(f"{where}: field 'tool_calls' is not a list of calls")
    legacy = [turn["function_call"]] if turn.get("function_call") else []
    return tuple(_call(call, where) for call in [*given, *legacy])


def _call(given: Any, where: str) -> ToolCall:
    function = given.get("function", given) if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: field 'tool_calls' holds a call without the name of its function")
    arguments = function.get("arguments", function.get("parameters"))  # type: ignore[union-attr]
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}: field 'tool_calls', arguments of {name}")
    if not isinstance(arguments or {}, dict):
        raise UserError(f"{where}: field 'tool_calls', arguments of {name} are not an object")
    return ToolCall(name, json.dumps(arguments or {}, ensure_ascii=False), str(given.get("id") or ""))


def _tools(given: Any, where: str) -> str:
    if not given:
        return ""
    tools = parse_json(given, f"{where}: field 'tools'") if isinstance(given, str) else given
    names = [tool.get("function", tool).get("name") if isinstance(tool, dict) else None for tool in tools or []]
    if not isinstance(tools, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: field 'tools' is not a list of function definitions with a name")
    return json.dumps(tools, ensure_ascii=False)
