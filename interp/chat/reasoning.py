"""Thinking set apart from what is said: nothing that a model rehearses counts as done, refused or promised.

The spoken text keeps its length: what is thinking becomes spaces, so that positions in it are positions in the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Opening and closing marks of thinking, as today's families write them.
_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
)
_OPENING = re.compile("|".join(re.escape(a) for a, _ in _TAGS), re.IGNORECASE | re.MULTILINE)
_CLOSING = re.compile("|".join(re.escape(b) for _, b in _TAGS), re.IGNORECASE)
# gpt-oss: every message names its channel; only what goes to the user or to a tool is said.
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?P<to1>[^<\n]{0,80})<\|channel\|>(?P<name>\w+)(?P<to2>[^<\n]{0,80})"
    r"(?:<\|constrain\|>\w*)?[^<\n]{0,20}<\|message\|>"
)
_MESSAGE_END = re.compile(r"<\|(?:end|call|return)\|>")


@dataclass(frozen=True)
class Spoken:
    """An answer without its thinking.

    Attributes:
        text: as long as the answer; thinking is blank.
        reasoning: what was thought.
        cut: the answer ended while thinking: nothing was said.
    """

    text: str
    reasoning: str = ""
    cut: bool = False


def set_apart(answer: str, begun: bool = False) -> Spoken:
    """Find thinking that is closed, cut off, or begun by the prompt (only its end stands in the answer).

    Args:
        begun: the prompt is known to have begun it, so that an answer without an end of it was cut off.
    """
    if "<|channel|>" in answer:
        return _by_channel(answer)
    if not begun and not any(mark in answer for mark in ("<", "[", "◁")):
        return Spoken(answer)
    pieces: list[str] = []
    thoughts: list[str] = []
    at, opened = 0, 0 if begun else -1  # where the next piece begins; where thinking began, if it has
    for mark in sorted([*_OPENING.finditer(answer), *_CLOSING.finditer(answer)], key=lambda found: found.start()):
        if mark.start() < at or _within_a_line(answer, mark):
            continue
        closes = _CLOSING.fullmatch(mark[0]) is not None
        if not closes and opened < 0:
            pieces.append(answer[at : mark.start()])
            at, opened = mark.start(), mark.end()
        elif closes and (opened >= 0 or not thoughts):  # the prompt may have opened it; a stray end is only a mark
            thoughts.append(answer[max(opened, at) : mark.start()].strip())
            pieces.append(_blank(answer[at : mark.end()]))
            at, opened = mark.end(), -1
        elif closes:
            pieces += [answer[at : mark.start()], _blank(mark[0])]
            at = mark.end()
    if opened >= 0:
        thoughts.append(answer[opened:].strip())
    pieces.append(_blank(answer[at:]) if opened >= 0 else answer[at:])
    text = "".join(pieces)
    return Spoken(text, "\n".join(thoughts), opened >= 0 and not text.strip())


def _within_a_line(answer: str, mark: re.Match[str]) -> bool:
    """A mark in quotation marks is typed text: ``fill('7', '</think>')``."""
    return answer[mark.end() : mark.end() + 1] in ("'", '"') and answer[mark.start() - 1 : mark.start()] in ("'", '"')


def _by_channel(answer: str) -> Spoken:
    """Messages to a tool stay as they are; of the rest only the final channel's text."""
    pieces, thoughts, at, spoke = [], [], 0, False
    for head in _CHANNEL.finditer(answer):
        if head.start() < at:
            continue
        ending = _MESSAGE_END.search(answer, head.end())
        stop = ending.start() if ending else len(answer)
        end = ending.end() if ending else len(answer)
        pieces.append(_blank(answer[at : head.start()]))
        body = answer[head.end() : stop]
        if "to=" in head["to1"] + head["to2"]:
            pieces.append(answer[head.start() : end])
            spoke = True
        elif head["name"].lower() == "final":
            pieces.append(_blank(head[0]) + body + _blank(answer[stop:end]))
            spoke = True
        else:
            thoughts.append(body.strip())
            pieces.append(_blank(answer[head.start() : end]))
        at = end
    pieces.append(answer[at:])
    text = "".join(pieces)
    return Spoken(text, "\n".join(thoughts), not spoke and not text.strip())


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)
