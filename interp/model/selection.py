"""Layers and positions: the one language of "where", shared by capture, probes, steering and figures.

A selection names tokens by what they are, never by column: ``final``, ``prompt``, ``role:instruction,page``,
``at:0,-2``, ``generated[0:5]``, joined left to right by ``|`` (or) and ``-`` (without), with parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pingscope.interp.chat.rendering import ROLES, Rendered
from pingscope.interp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EMBED = -1  # the "layer" before block 0


@dataclass(frozen=True)
class Selection:
    """A set of token positions, resolved per prompt. Build it with the functions below or :func:`parse`.

    ``kind`` is ``final``, ``prompt``, ``role``, ``at`` or ``generated``; or ``|``, ``-`` with two parts.
    """

    kind: str
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    stop: int | None = None
    parts: tuple[Selection, ...] = ()

    def __or__(self, other: Selection) -> Selection:
        return Selection("|", parts=(self, other))

    def __sub__(self, other: Selection) -> Selection:
        return Selection("-", parts=(self, other))

    def __str__(self) -> str:
        if self.kind == "role":
            return "role:" + ",".join(self.names)
        if self.kind == "at":
            return "at:" + ",".join(map(str, self.numbers))
        if self.kind == "generated":
            return f"generated[{self.numbers[0]}:{'' if self.stop is None else self.stop}]"
        if not self.parts:
            return self.kind
        left, right = self.parts
        return f"{left} {self.kind} {f'({right})' if right.parts else right}"

    def mask(self, rendered: Rendered) -> list[bool]:
        """One flag per rendered token. Response tokens that are already there count as generated."""
        n, total = rendered.n_prompt, len(rendered)
        match self.kind:
            case "final":
                return [i == n - 1 for i in range(total)]
            case "prompt":
                return [i < n for i in range(total)]
            case "role":
                return [role in self.names for role in rendered.roles]
            case "at":
                wanted = {i if i >= 0 else n + i for i in self.numbers}
                return [i in wanted and i < n for i in range(total)]
            case "generated":
                return [i >= n and self._in_window(i - n) for i in range(total)]
        left, right = (part.mask(rendered) for part in self.parts)
        if self.kind == "|":
            return [a or b for a, b in zip(left, right, strict=True)]
        return [a and not b for a, b in zip(left, right, strict=True)]

    def generated_mask(self, index: Tensor) -> Tensor:
        """Which generated tokens are meant; ``index`` counts from 0 at the first token after the prompt."""
        match self.kind:
            case "generated":
                inside = index >= self.numbers[0]
                return inside if self.stop is None else inside & (index < self.stop)
            case "role" if "response" in self.names:
                return index >= 0
            case "|":
                return self.parts[0].generated_mask(index) | self.parts[1].generated_mask(index)
            case "-":
                return self.parts[0].generated_mask(index) & ~self.parts[1].generated_mask(index)
        return (index < 0) & (index >= 0)  # prompt words never mean generated tokens

    def _in_window(self, i: int) -> bool:
        return i >= self.numbers[0] and (self.stop is None or i < self.stop)


def final() -> Selection:
    """The last token before the model speaks."""
    return Selection("final")


def prompt() -> Selection:
    """Every token before the response."""
    return Selection("prompt")


def role(*names: str) -> Selection:
    """Tokens of these roles; ``response`` includes the tokens being generated."""
    for name in names:
        if name not in ROLES:
            raise UserError(f"selection: unknown role {name!r}; roles are {', '.join(ROLES)}")
    if not names:
        raise UserError(f"selection: role() needs a role; roles are {', '.join(ROLES)}")
    return Selection("role", names=names)


def at(*indices: int) -> Selection:
    """Positions in the prompt, from 0; negative ones count back from its end (-1 is the final token)."""
    if not indices:
        raise UserError("selection: at() needs a position, such as at(0) or at(-1)")
    return Selection("at", numbers=indices)


def generated(start: int = 0, stop: int | None = None) -> Selection:
    """Tokens the model produces, half open: ``generated(0, 5)`` is the first five."""
    if start < 0 or (stop is not None and stop <= start):
        raise UserError(f"selection: generated[{start}:{stop}] is empty; use 0 <= start < stop")
    return Selection("generated", numbers=(start,), stop=stop)


_TOKEN = re.compile(
    r"\s*(?:(?P<generated>generated(?:\[(?P<start>\d*):(?P<stop>\d*)\])?)|role:(?P<role>[a-z]+(?:\s*,\s*[a-z]+)*)"
    r"|at:(?P<at>-?\d+(?:\s*,\s*-?\d+)*)|(?P<word>final|prompt)|(?P<op>[|()-]))"
)


def parse(text: str) -> Selection:
    """Read the written form of a selection; ``parse(str(s)) == s``.

    Raises:
        UserError: a word, role or bracket that is not part of the language, with the place.
    """
    tokens: list[Selection | str] = []
    cursor = 0
    while cursor < len(text.rstrip()):
        found = _TOKEN.match(text, cursor)
        if found is None:
            raise UserError(
                f"selection {text!r}: cannot read {text[cursor:].strip()!r}; use final, prompt, role:NAME,…, "
                "at:INDEX,…, generated[START:STOP] joined by | and -"
            )
        cursor = found.end()
        if found["op"]:
            tokens.append(found["op"])
        elif found["word"]:
            tokens.append(Selection(found["word"]))
        elif found["role"]:
            tokens.append(role(*re.split(r"\s*,\s*", found["role"])))
        elif found["at"]:
            tokens.append(at(*map(int, found["at"].split(","))))
        else:
            tokens.append(generated(int(found["start"] or 0), int(found["stop"]) if found["stop"] else None))
    selection, rest = _parse_sum(tokens, text)
    if rest:
        raise UserError(f"selection {text!r}: unexpected {str(rest[0])!r}; join parts by | or -")
    return selection


def _parse_sum(tokens: list[Selection | str], text: str) -> tuple[Selection, list[Selection | str]]:
    left, tokens = _parse_part(tokens, text)
    while tokens and tokens[0] in ("|", "-"):
        right, rest = _parse_part(tokens[1:], text)
        left, tokens = (left | right if tokens[0] == "|" else left - right), rest
    return left, tokens


def _parse_part(tokens: list[Selection | str], text: str) -> tuple[Selection, list[Selection | str]]:
    if tokens and isinstance(tokens[0], Selection):
        return tokens[0], tokens[1:]
    if tokens and tokens[0] == "(":
        inner, rest = _parse_sum(tokens[1:], text)
        if rest and rest[0] == ")":
            return inner, rest[1:]
    raise UserError(f"selection {text!r}: incomplete; a part or a closing parenthesis is missing")


LayerSpec = str | int | Sequence[int]


def resolve_layers(layers: LayerSpec, n_layers: int) -> list[int]:
    """Sorted layer numbers from ``"all"``, ``"1-4"``, ``"0,2"``, ``"embed,all"``, an int or a list of ints.

    Layers are block outputs 0 … n_layers - 1; ``embed`` or -1 is the residual stream before block 0, which
    ``all`` leaves out.
    """
    chosen: list[int] = []
    for part in layers.split(",") if isinstance(layers, str) else ([layers] if isinstance(layers, int) else layers):
        word = str(part).strip()
        if word == "all":
            chosen += range(n_layers)
        elif word == "embed":
            chosen.append(EMBED)
        elif re.fullmatch(r"-?\d+", word):
            chosen.append(int(word))
        elif span := re.fullmatch(r"(\d+)-(\d+)", word):
            chosen += range(int(span[1]), int(span[2]) + 1)
        else:
            raise UserError(f"layers {layers!r}: cannot read {word!r}; use all, embed, 3, 1-4 or 0,2,5")
    for layer in chosen:
        if not EMBED <= layer < n_layers:
            raise UserError(
                f"layers {layers!r}: no layer {layer}; the model has layers 0-{n_layers - 1} (and embed, -1)"
            )
    if not chosen:
        raise UserError(f"layers {layers!r}: empty; the model has layers 0-{n_layers - 1}")
    return sorted(set(chosen))


def find_matches(where: Selection, rows: Sequence[Rendered]) -> list[list[bool]]:
    """The mask of every prompt.

    Raises:
        UserError: the selection matches no token of any prompt.
    """
    masks = [where.mask(row) for row in rows]
    if not any(map(any, masks)):
        raise UserError(f"selection '{where}' matches no token of the {len(rows)} prompts; check its roles")
    return masks
