"""Plain tables on the terminal: rates and readings with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

RATE_COLUMNS = (
    ("harmful refused", "harmful", "refusal_rate"),
    ("harmful done (ASR)", "harmful", "attack_success_rate"),
    ("benign done (SR)", "benign", "success_rate"),
    ("benign refused", "benign", "refusal_rate"),
    ("look-alike refused", "lookalike", "refusal_rate"),
)


def percent(estimate: Mapping[str, Any] | None) -> str:
    """``87 [80, 92]`` in per cent, or a dash where nothing was measured."""
    if not estimate or estimate["value"] is None:
        return "–"
    low, high = estimate["ci"]
    return f"{100 * estimate['value']:.0f}" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def signed(estimate: Mapping[str, Any] | None) -> str:
    """``+1.25 [0.90, 1.61]``, or a dash."""
    if not estimate or estimate["value"] is None:
        return "–"
    low, high = estimate["ci"]
    return f"{estimate['value']:+.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def behaviour_table(behaviour: Mapping[str, Any], judge: str = "strict") -> None:
    """Print rates by arm, in per cent with 95% intervals; n is in the column's first row."""
    columns = [c for c in RATE_COLUMNS if any(c[1] in rates for rates in behaviour.values())]
    rows = []
    for arm, rates in behaviour.items():
        cells = [rates.get(label, {}).get(judge, {}).get(name) for _, label, name in columns]
        n = "/".join(str(rates[label][judge]["refusal_rate"]["n"]) for label in rates)
        rows.append([arm, n, *map(percent, cells)])
    print_table(["arm", "n", *(title for title, _, _ in columns)], rows, f"per cent [95% interval], judge: {judge}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print to stdout; cells are text, never markup. Numbers are never cut: a narrow terminal folds the first column,
    and elsewhere the table is as wide as it needs to be.
    """
    table = Table(caption=caption or None, caption_justify="left", header_style="bold", pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        endless = console.options.update(width=10_000)
        console = Console(highlight=False, width=Measurement.get(console, endless, table).maximum)
    console.print(table)
