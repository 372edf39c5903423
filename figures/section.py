"""What a figure hands to the page: panels, the controls that switch them, a key, tables, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go


@dataclass(frozen=True)
class Panel:
    """One plot. ``view`` names the control values under which it is shown; traces carry theirs in ``meta``."""

    title: str
    figure: go.Figure
    alt: str
    view: dict[str, str] = field(default_factory=dict)
    wide: bool = False
    keys: Sequence[Key] = ()  # for this panel alone


@dataclass(frozen=True)
class Control:
    """A slider (``kind="range"``) or a row of buttons (``"choice"``) over (value, label) options."""

    key: str
    label: str
    options: tuple[tuple[str, str], ...]
    start: str
    kind: str = "choice"

    @property
    def values(self) -> list[str]:
        return [value for value, _ in self.options]

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.options]


@dataclass(frozen=True)
class Key:
    """One entry of a figure's key: a palette name and the mark that stands for it."""

    label: str
    colour: str
    mark: str = "dot"  # dot | diamond | square | ring | line | dash | dotted | band


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    text_columns: int = 1  # columns from the left that hold words; the others hold numbers
    text_last: bool = False  # the last column holds words too, broken into lines
    view: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    question: str
    reading: str
    panels: Sequence[Panel] = ()
    controls: Sequence[Control] = ()
    keys: Sequence[Key] = ()
    tables: Sequence[Table] = ()
    columns: int = 1
    note: str = ""


def layer_control(layers: Sequence[str], start: str) -> tuple[Control, ...]:
    """A slider over layers; none where there is nothing to choose."""
    if len(layers) < 2:
        return ()
    return (Control("layer", "Layer", tuple((layer, layer) for layer in layers), start, "range"),)
