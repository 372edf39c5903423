"""What a chat template writes: a program from elsewhere, run with its clock standing still and within bounds."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from pingscope.interp.errors import UserError

# Some templates print today's date where none is given: the same prompt would have other ids tomorrow.
CLOCK = datetime(2024, 7, 26, 12, 0)
TEMPLATE_DATE = CLOCK.strftime("%d %b %Y")
_DIRECTIVES = "aAbBcdfHIjmMpSUwWxXyYzZ"
# The template's own clock, as a macro in front of it: transformers lets no function through from outside. The line end
# behind it is dropped by jinja, and the template begins a line of its own, as it does without.
_PINNED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('%-{c}', '{CLOCK.strftime('%' + c).lstrip('0') or '0'}')" for c in "dmHIMSjy")
    + "".join(f"|replace('%{c}', '{CLOCK.strftime('%' + c)}')" for c in _DIRECTIVES)
    + "|replace('%s', '1721995200')|replace('%N', '0') }}{%- endmacro %}\n"
)
SECONDS = 10.0  # of honest templates the slowest takes milliseconds
# What a template may raise on the way; some of it when it is compiled.
_FAILURES = (
    TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError,
    SyntaxError, TimeoutError,
)  # fmt: skip


def written(
    tokenizer: Any,
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    variables: Mapping[str, Any],
    *,
    answer: bool,
) -> str:
    """Messages as the template ``source`` writes them; with the generation prompt where an ``answer`` is to follow.

    The arguments of tool calls are objects, which most templates turn into JSON; those that write them as they come
    (DeepSeek) would fail, or show Python's spelling of them, and get JSON.

    Raises:
        UserError: the template refuses the messages, fails, or does not come to an end.
    """

    def write(chat: Sequence[Mapping[str, Any]]) -> str:
        with _within(SECONDS):
            return tokenizer.apply_chat_template(
                chat,
                tools=tools,
                chat_template=_PINNED + source,
                tokenize=False,
                add_generation_prompt=answer,
                **{"date_string": TEMPLATE_DATE, **variables},
            )

    arguments = [call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ())]
    try:
        try:
            text = write(messages)
        except TypeError:
            if not arguments:
                raise
            return write([_with_json(message) for message in messages])
        foreign = [str(given) for given in arguments if given and str(given) != _as_json(given)]
        if any(spelled in text for spelled in foreign):
            again = write([_with_json(message) for message in messages])
            text = text if any(spelled in again for spelled in foreign) else again
        return text
    except _FAILURES as error:
        what = "a system prompt" if any(m["role"] == "system" for m in messages) else "this conversation"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the chat template refuses {what} ({reason}); put the text in the "
            "instruction or pass another template with --chat-template FILE (chat_template=)"
        ) from error


def _with_json(message: Mapping[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        call | {"function": call["function"] | {"arguments": _as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return dict(message) | {"tool_calls": calls}


def _as_json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Stop what takes longer: nested loops stay below every limit of jinja's and would fill the memory.

    Alarms reach the main thread only, and not on Windows; one that somebody else has set is left alone.
    """
    free = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not free or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it has not come to an end after {seconds:g} seconds")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
