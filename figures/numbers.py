"""Reading estimates out of results: a number, its interval, its words. Missing stays missing."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

from pingscope.schema import Estimate

MISSING = "–"


def number(cell: Any) -> float:
    """The value of an estimate or of a bare number; NaN when it is missing."""
    value = cell.value if isinstance(cell, Estimate) else cell
    return float(value) if isinstance(value, int | float) else math.nan


def interval(cell: Any) -> tuple[float, float]:
    """The confidence interval; NaN where either end is missing."""
    ends = cell.ci if isinstance(cell, Estimate) else None
    low, high = ends if ends else (None, None)
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return math.nan, math.nan
    return float(low), float(high)


def values(cells: Iterable[Any]) -> np.ndarray:
    return np.array([number(cell) for cell in cells], dtype=np.float32)


def bounds(cells: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends as two arrays."""
    pairs = [interval(cell) for cell in cells]
    return np.array([p[0] for p in pairs], np.float32), np.array([p[1] for p in pairs], np.float32)


def error_bar(cells: list[Any], colour: str) -> dict[str, Any]:
    """Asymmetric error bars around ``cells`` for plotly; absent where the interval is."""
    centre, (low, high) = values(cells), bounds(cells)
    return {
        "type": "data",
        "symmetric": False,
        "array": np.nan_to_num(high - centre),
        "arrayminus": np.nan_to_num(centre - low),
        "thickness": 1.6,
        "width": 0,
        "color": colour,
    }


def rate(cell: Any, label: str, name: str, judge: str = "strict") -> Any:
    """``cell[label][judge][name]``, or ``cell[label][name]`` where no judge stands between; None if absent."""
    inner = (cell or {}).get(label) or {}
    return (inner.get(judge) or inner).get(name)


def percent(cell: Any, with_interval: bool = True) -> str:
    value, (low, high) = number(cell), interval(cell)
    if math.isnan(value):
        return MISSING
    text = f"{100 * value:.0f}%"
    return text if math.isnan(low) or not with_interval else f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


def plain(cell: Any, digits: int = 2, signed: bool = False) -> str:
    value, (low, high) = number(cell), interval(cell)
    if math.isnan(value):
        return MISSING
    form = f"{'+' if signed else ''}.{digits}f"
    # Rounded and + 0.0 first, so that a small negative is written 0.0 and not -0.0.
    value, low, high = (round(end, digits) + 0.0 for end in (value, low, high))
    text = format(value, form)
    if not math.isnan(low):
        text += f" [{low:{form}}, {high:{form}}]"
    return text.replace("-", "\u2212")


def count(cell: Any) -> str:
    if not isinstance(cell, Estimate) or cell.n is None:
        return MISSING
    return f"{cell.n}" + (f" ({cell.n_missing} missing)" if cell.n_missing else "")


def sort_layers(layers: Iterable[str]) -> list[str]:
    """Embedding first, then by number; spans such as ``1-4`` after the single layers."""

    def key(layer: str) -> tuple[int, float, str]:
        if layer == "embed":
            return 0, -1, layer
        try:
            return 0, float(layer), layer
        except ValueError:
            return 1, 0, layer

    return sorted(layers, key=key)


def escape(text: str, limit: int = 0) -> str:
    """Text for a plotly label, whose small HTML must not be reached by a prompt; cut to ``limit`` characters."""
    text = "".join(" " if ord(c) < 32 or c in "\x7f\u2028\u2029" else c for c in text)
    if limit and len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def wrap(text: str, width: int = 56, lines: int = 6) -> str:
    """Escaped text broken into plotly lines; words longer than a line are broken too."""
    rows = textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …")
    return "<br>".join(escape(row) for row in rows)
