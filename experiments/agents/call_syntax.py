"""The grammar of one action call: known names, their parameters, literal arguments. Nothing is evaluated."""

from __future__ import annotations

import ast
import re
from typing import Any

# name -> (parameters in positional order, how many are required)
SIGNATURES: dict[str, tuple[tuple[str, ...], int]] = {
    # WebRL
    "do": (("action", "argument", "element"), 1),
    "exit": (("message",), 0),
    "go_backward": ((), 0),
    "go_forward": ((), 0),
    # BrowserGym
    "click": (("bid", "button", "modifiers"), 1),
    "dblclick": (("bid", "button", "modifiers"), 1),
    "hover": (("bid",), 1),
    "fill": (("bid", "value", "enable_autocomplete_menu"), 2),
    "select_option": (("bid", "options"), 2),
    "check": (("bid",), 1),
    "uncheck": (("bid",), 1),
    "press": (("bid", "key_comb"), 2),
    "focus": (("bid",), 1),
    "clear": (("bid",), 1),
    "drag_and_drop": (("from_bid", "to_bid"), 2),
    "upload_file": (("bid", "file"), 2),
    "scroll": (("delta_x", "delta_y"), 2),
    "mouse_move": (("x", "y"), 2),
    "mouse_click": (("x", "y", "button"), 2),
    "mouse_dblclick": (("x", "y", "button"), 2),
    "mouse_drag_and_drop": (("from_x", "from_y", "to_x", "to_y"), 4),
    "keyboard_press": (("key",), 1),
    "keyboard_type": (("text",), 1),
    "keyboard_insert_text": (("text",), 1),
    "goto": (("url",), 1),
    "go_back": ((), 0),
    "new_tab": ((), 0),
    "tab_close": ((), 0),
    "tab_focus": (("index",), 1),
    "noop": (("wait_ms",), 0),
    "send_msg_to_user": (("text",), 1),
    "report_infeasible": (("reason",), 1),
}
NAMES = "|".join(sorted(SIGNATURES, key=len, reverse=True))

WEB_ACTIONS = {
    "click",
    "right click",
    "double click",
    "hover",
    "type",
    "search",
    "scroll up",
    "scroll down",
    "press enter",
    "switch tab",
    "select dropdown option",
    "wait",
}
# These point at an element and take no argument: `do(Click, inbox)` names the element second.
POINTERS = {"click", "right click", "double click", "hover"}

_BARE = re.compile(r"\w[^\"\n(){}\[\]=,]*")
_NAMED = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)")
_OPENS_VALUE = "(,=[{:"
_AFTER_STRING = re.compile(r"\s*(?:[,)\]}:]|\Z)")


class Malformed(ValueError):
    """What follows the name is not an argument list this grammar knows."""


class LeftOpen(Malformed):
    """The argument list never ends."""


def read_arguments(name: str, text: str, start: int, stop: int) -> tuple[dict[str, Any], int, bool]:
    """Read the arguments of ``name`` from ``text[start:stop]``, just after the opening bracket.

    Returns:
        the arguments by name, the position after the closing bracket, and whether every one of them was a
        bare positional word (which prose in brackets can look like too).

    Raises:
        Malformed: brackets or quotes left open, something other than literals, or arguments that do not fit.
    """
    pieces, end = _split(text, start, stop)
    positional, named, bare = [], {}, bool(pieces)
    for piece in pieces:
        key = _NAMED.match(piece)
        if key:
            if key[1].lower() in named:
                raise Malformed(f"repeated argument {key[1]}")
            named[key[1].lower()], _ = _literal(piece[key.end() :])
            bare = False
        elif named:
            raise Malformed("positional argument after a named one")
        else:
            value, word = _literal(piece)
            positional.append(value)
            bare = bare and word
    return _bind(name, positional, named), end, bare


def _bind(name: str, positional: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    parameters, required = SIGNATURES[name]
    order = parameters
    if name == "do" and len(positional) == 2 and str(positional[0]).lower() in POINTERS:
        order = ("action", "element", "argument")
    if len(positional) > len(order):
        raise Malformed(f"{name} takes at most {len(order)} arguments")
    args = dict(zip(order, positional, strict=False))
    for key, value in named.items():
        if key not in parameters or key in args:
            raise Malformed(f"{name} does not take {key} here")
        args[key] = value
    if any(args.get(key) is None for key in parameters[:required]) or (name == "do" and args["action"] == ""):
        raise Malformed(f"{name} needs {', '.join(parameters[:required])}")
    return args


def _split(text: str, start: int, stop: int) -> tuple[list[str], int]:
    """Cut the argument list at its own commas; brackets and commas inside strings do not count."""
    pieces, depth, piece, at = [], 0, start, start
    previous = "("
    while at < stop:
        char = text[at]
        if char in "\"'" and previous in _OPENS_VALUE:
            at = _string_end(text, at, stop)
            previous = '"'
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            if depth == 0:
                if char != ")":
                    raise Malformed("wrong closing bracket")
                last = text[piece:at]
                if last.strip():
                    pieces.append(last)
                return pieces, at + 1
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[piece:at])
            piece = at + 1
        if not char.isspace():
            previous = char
        at += 1
    raise LeftOpen("bracket left open")


def _string_end(text: str, at: int, stop: int) -> int:
    """Position after the string that opens at ``at``.

    A quote closes the string only where an argument may end: models often leave quotes in typed text bare.
    """
    quote = text[at : at + 3] if text[at : at + 3] in ('"""', "'''") else text[at]
    at += len(quote)
    while at < stop:
        if text[at] == "\\":
            at += 2
        elif text.startswith(quote, at) and _AFTER_STRING.match(text, at + len(quote), stop):
            return at + len(quote)
        else:
            at += 1
    raise LeftOpen("quote left open")


def _literal(piece: str) -> tuple[Any, bool]:
    """The value of one argument and whether it was a bare word."""
    piece = piece.strip()
    try:
        return ast.literal_eval(piece), False
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    if len(piece) >= 2 and piece[0] in "\"'" and piece[-1] == piece[0]:
        quote = piece[0]
        escapes = {"\n": "\\n", "\r": "\\r", quote: "\\" + quote}
        body = re.sub(rf"\\.|[\n\r{quote}]", lambda m: escapes.get(m[0], m[0]), piece[1:-1], flags=re.DOTALL)
        try:
            return ast.literal_eval(quote + body + quote), False
        except (ValueError, SyntaxError) as error:
            raise Malformed("not a string literal") from error
    if _BARE.fullmatch(piece):
        return piece, True
    raise Malformed("not a literal")
