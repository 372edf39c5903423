"""Actions in the text an agent wrote: WebRL, BrowserGym, CodeAct, JSON tool calls. Parsed, never run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pingscope.experiments.agents.call_syntax import NAMES, WEB_ACTIONS, Malformed, read_arguments

Status = Literal["ok", "no_action", "malformed", "multiple"]


@dataclass(frozen=True)
class Call:
    """One action; ``text`` is ``source[start:end]``. Values are literals as written (str, int, …)."""

    name: str
    args: dict[str, Any]
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Parsed:
    """What a continuation holds.

    Attributes:
        calls: well-formed actions in order.
        comments: lines that start with ``#``, without the mark.
        prose: everything else, line by line, without calls, comments, fences and tags.
        status: ``ok`` (one call), ``multiple``, ``malformed`` (an action was begun, none is well formed) or
            ``no_action``.
    """

    calls: tuple[Call, ...]
    comments: tuple[str, ...]
    prose: str
    status: Status


@lru_cache(maxsize=4096)  # every judge and every step reads the same few answers
def parse_actions(text: str) -> Parsed:
    """Find the actions in a model's continuation. Never raises on any text, and never evaluates it."""
    scan = _Scan(text)
    whole = _json_calls(text.strip())
    if whole:
        lead = len(text) - len(text.lstrip())
        scan.take(whole, lead, lead + len(text.strip()))
    else:
        scan.run(0, len(text))
    calls = tuple(scan.calls)
    status: Status = "no_action"
    if calls:
        status = "ok" if len(calls) == 1 else "multiple"
    elif scan.malformed:
        status = "malformed"
    return Parsed(calls, tuple(scan.comments), scan.prose(), status)


# Quoted text in a line of prose is a token of its own, so that "do(…)" in a quotation starts no call. A call
# at the start of a line is met before any quotation of that line.
_TOKEN = re.compile(
    rf"""(?P<comment>^[ \t]*\#[^\n]*)
    |<(?P<tag>execute|solution|thought|tool_call)>
    |```(?P<language>[\w+-]*)
    |(?<![\w.])(?P<name>{NAMES})\(
    |"[^"\n]*"|(?<!\w)'[^'\n]*'(?!\w)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_CLOSING_TAG = re.compile(r"</?(?:execute|solution|thought|tool_call)>", re.IGNORECASE)
_TRAILING_COMMENT = re.compile(r"[ \t;]*(#[^\n]*)")
_LINE_LEAD = re.compile(r"[\s>*`-]*(?:\d+[.)]\s*)?(?:(?:next )?action\s*:)?[\s`]*", re.IGNORECASE)
_LOOKS_CALLED = re.compile(r"\s*(?:\w+\s*=|[\"'])")
_CODE_LANGUAGES = {"python", "py", "python3", "bash", "sh", "shell"}


@dataclass
class _Scan:
    """One walk over the text, left to right; what a call or a comment covers is never looked at again."""

    text: str
    calls: list[Call] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    taken: list[tuple[int, int]] = field(default_factory=list)
    malformed: bool = False

    def run(self, at: int, stop: int) -> None:
        while (token := _TOKEN.search(self.text, at, stop)) is not None:
            if token["comment"] is not None:
                self._comment(token.start(), token.end())
                at = token.end()
            elif token["tag"] is not None:
                at = self._tagged(token["tag"].lower(), token.start(), token.end(), stop)
            elif token["language"] is not None:
                at = self._fence(token["language"].lower(), token.start(), token.end(), stop)
            elif token["name"] is not None:
                at = self._call(token["name"].lower(), token.start(), token.end(), stop)
            else:
                at = token.end()

    def _call(self, name: str, start: int, inside: int, stop: int) -> int:
        after = max((end for _, end in self.taken if end <= start), default=0)
        begin = max(after, self.text.rfind("\n", 0, start) + 1)
        opens_line = _LINE_LEAD.fullmatch(self.text, begin, start) is not None
        try:
            args, end, bare = read_arguments(name, self.text[:stop], inside)
        except Malformed:
            self.malformed |= opens_line or _LOOKS_CALLED.match(self.text, inside, stop) is not None
            return inside
        known = name == "do" and (len(args) > 1 or str(args["action"]).lower() in WEB_ACTIONS)
        if bare and not known and not opens_line:
            return inside  # prose in brackets: "how do(es) one …", "please fill(in) …"
        self.take([(name, args)], start, end)
        trailing = _TRAILING_COMMENT.match(self.text, end, stop)
        if trailing:
            self._comment(trailing.start(1), trailing.end(1))
            return trailing.end(1)
        return end

    def _tagged(self, tag: str, start: int, inside: int, stop: int) -> int:
        closing = _CLOSING_TAG.search(self.text, inside, stop)
        body_end = closing.start() if closing else stop
        # A missing closing tag ends at the next opening one, which is left to be read.
        end = closing.end() if closing and closing[0].startswith("</") else body_end
        body = self.text[inside:body_end].strip()
        if tag == "thought":
            self.taken += [(start, inside), (body_end, end)]
            return end
        found: list[tuple[str, dict[str, Any]]] = []
        if tag == "tool_call":
            found = _json_calls(body)
        elif body:
            found = [("execute", {"code": _unfenced(body)}) if tag == "execute" else ("solution", {"answer": body})]
        self.malformed |= not found
        self.take(found, start, end)
        return end

    def _fence(self, language: str, start: int, inside: int, stop: int) -> int:
        closing = self.text.find("```", inside, stop)
        body_end, end = (closing, closing + 3) if closing >= 0 else (stop, stop)
        body = self.text[inside:body_end]
        if found := _json_calls(body.strip()):
            self.take(found, start, end)
            return end
        if language in _CODE_LANGUAGES and body.strip():
            inner = _Scan(self.text)
            inner.run(inside, body_end)
            if not inner.calls or inner.prose(inside, body_end):  # a program, not a list of web actions
                self.take([("execute", {"code": body.strip(), "language": language})], start, end)
                return end
        self.taken.append((start, inside))
        return inside

    def _comment(self, start: int, end: int) -> None:
        self.comments.append(self.text[start:end].strip().lstrip("#").strip())
        self.taken.append((start, end))

    def take(self, found: list[tuple[str, dict[str, Any]]], start: int, end: int) -> None:
        self.calls += [Call(name, args, self.text[start:end], start, end) for name, args in found]
        self.taken.append((start, end))

    def prose(self, start: int = 0, stop: int | None = None) -> str:
        parts, at = [], start
        stop = len(self.text) if stop is None else stop
        for begin, end in sorted(self.taken):
            parts.append(self.text[at : max(at, begin)])
            at = max(at, end)
        parts.append(self.text[at : max(at, stop)])
        lines = (line.strip(" \t`;") for line in "\n".join(parts).splitlines())
        return "\n".join(line for line in lines if line)


def _unfenced(code: str) -> str:
    return re.sub(r"\A```[\w+-]*\n?|\n?```\Z", "", code).strip()


def _json_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Tool calls in a JSON text: one call, a list of calls, or a message with ``tool_calls``."""
    if not text.startswith(("{", "[")):
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    rows = value if isinstance(value, list) else [value]
    found = [_json_call(row) for row in rows]
    return [call for call in found if call is not None] if all(found) else []


def _json_call(row: Any) -> tuple[str, dict[str, Any]] | None:
    if isinstance(row, dict) and isinstance(row.get("function"), dict):
        row = row["function"]
    if not isinstance(row, dict):
        return None
    name = next((row[key] for key in ("name", "tool", "action", "function") if isinstance(row.get(key), str)), "")
    keys = ("arguments", "args", "parameters", "input", "action_input")
    args = next((row[key] for key in keys if key in row), None)
    if isinstance(args, str):
        try:
            args = json.loads(args or "{}")
        except (ValueError, RecursionError):
            return None
    return (name.lower(), args) if name.strip() and isinstance(args, dict) else None
