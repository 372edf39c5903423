"""The one reader of answers: thinking set apart, actions of every known syntax, comments, speech. Parsed, never run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pingscope.experiments.agents.call_syntax import NAMES, WEB_ACTIONS, LeftOpen, Malformed, read_arguments
from pingscope.experiments.agents.native_calls import fenced_call, json_calls, native_calls, tagged_call
from pingscope.interp.chat.reasoning import set_apart

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
        reasoning: what was thought before or between; nothing in it is an action or a refusal.
        refusal: what an endpoint gave as the model's refusal, in a field of its own.
    """

    calls: tuple[Call, ...]
    comments: tuple[str, ...]
    prose: str
    status: Status
    reasoning: str = ""
    refusal: str = ""


@lru_cache(maxsize=4096)  # every judge and every step reads the same few answers
def parse_actions(text: str, thinking: bool = False) -> Parsed:
    """Find the actions in a model's continuation. Never raises on any text, and never evaluates it.

    Args:
        thinking: the prompt ended in the middle of a thought, which the continuation goes on with.
    """
    spoken = set_apart(text, thinking)
    refusal = spoken.text.partition("<refusal>")[2].partition("</refusal>")
    scan = _Scan(spoken.text)
    whole = json_calls(spoken.text.strip())
    if whole:
        lead = len(spoken.text) - len(spoken.text.lstrip())
        scan.take(whole, lead, lead + len(spoken.text.strip()))
    else:
        at = 0
        for start, end, named in native_calls(spoken.text):
            scan.run(at, start)
            scan.malformed |= not named
            scan.take(named, start, end)
            at = end
        scan.run(at, len(text))
    calls = tuple(scan.calls)
    status: Status = "no_action"
    if calls:
        status = "ok" if len(calls) == 1 else "multiple"
    elif scan.malformed:
        status = "malformed"
    said = refusal[0].strip() if refusal[1] else ""  # see pingscope.experiments.agents.endpoint
    return Parsed(calls, tuple(scan.comments), scan.prose(), status, spoken.reasoning, said)


# Quoted text in a line of prose is a token of its own, so that "do(…)" in a quotation starts no call. A call
# at the start of a line is met before any quotation of that line.
_TOKEN = re.compile(
    rf"""(?P<comment>^[ \t]*\#[^\n]*)
    |(?P<quoted>^[ \t]*>[^\n]*)
    |<(?P<tag>execute|execute_bash|execute_ipython|solution|thought|tool_call)>
    |```(?P<language>[\w+-]*)
    |(?<![\w.])(?P<name>{NAMES})\(
    |"[^"\n]*"|(?<!\w)'[^'\n]*'(?!\w)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_CLOSING_TAG = re.compile(r"</?(?:execute|execute_bash|execute_ipython|solution|thought|tool_call)>", re.IGNORECASE)
_TRAILING_COMMENT = re.compile(r"[ \t;]*(#[^\n]*)")
_LINE_LEAD = re.compile(r"[\s*`-]*(?:\d+[.)]\s*)?(?:(?:next )?action\s*:)?[\s`]*", re.IGNORECASE)
_LOOKS_CALLED = re.compile(r"\s*(?:\w+\s*=|[\"'])")
MOST_LEFT_OPEN = 50  # calls without an end are read to the end of the text, each of them
_CODE_LANGUAGES = {"python", "py", "python3", "bash", "sh", "shell", "zsh", "console", "powershell", "shell-session"}


@dataclass
class _Scan:
    """One walk over the text, left to right; what a call or a comment covers is never looked at again."""

    text: str
    calls: list[Call] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    taken: list[tuple[int, int]] = field(default_factory=list)
    malformed: bool = False
    left_open: int = 0

    def run(self, at: int, stop: int) -> None:
        while (token := _TOKEN.search(self.text, at, stop)) is not None:
            if token["comment"] is not None:
                self._comment(token.start(), token.end())
                at = token.end()
            elif token["quoted"] is not None:
                at = token.end()  # what the agent quotes it does not do
            elif token["tag"] is not None:
                at = self._tagged(token["tag"].lower(), token.start(), token.end(), stop)
            elif token["language"] is not None:
                at = self._fence(token["language"].lower(), token.start(), token.end(), stop)
            elif token["name"] is not None:
                at = self._call(token["name"].lower(), token.start(), token.end(), stop)
            else:
                at = token.end()

    def _call(self, name: str, start: int, inside: int, stop: int) -> int:
        if self.left_open > MOST_LEFT_OPEN:
            return stop
        after = self.taken[-1][1] if self.taken and self.taken[-1][1] <= start else 0  # what is taken comes in order
        begin = max(after, self.text.rfind("\n", 0, start) + 1)
        opens_line = _LINE_LEAD.fullmatch(self.text, begin, start) is not None
        try:
            args, end, bare = read_arguments(name, self.text, inside, stop)
        except Malformed as error:
            self.left_open += isinstance(error, LeftOpen)
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
            found = json_calls(body) or (tagged_call(body) if end > body_end else [])
        elif body:
            found = [
                ("execute", {"code": _unfenced(body)}) if tag.startswith("execute") else ("solution", {"answer": body})
            ]
        self.malformed |= not found
        self.take(found, start, end)
        return end

    def _fence(self, language: str, start: int, inside: int, stop: int) -> int:
        closing = self.text.find("```", inside, stop)
        body_end, end = (closing, closing + 3) if closing >= 0 else (stop, stop)
        body = self.text[inside:body_end]
        if found := json_calls(body.strip()) or fenced_call(language, body) or self._inline(start, body_end):
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

    def _inline(self, start: int, stop: int) -> list[tuple[str, dict[str, Any]]]:
        """A fence on one line, whose first word is no language: ```click [7]```."""
        inside = self.text[start + 3 : stop]
        return fenced_call("", inside) if "\n" not in inside.strip() else []

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
