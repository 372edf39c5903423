"""Plain tables on the terminal: rates and readings with their intervals, whole at any width."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.cells import cell_len

MAIN_COLUMNS = (  # these and the invalid answers stand together: none of them says much alone
    ("harmful refused", "harmful", "refusal_rate"),
    ("harmful done (ASR)", "harmful", "attack_success_rate"),
    ("benign done (SR)", "benign", "success_rate"),
)
MORE_COLUMNS = (
    ("benign refused", "benign", "refusal_rate"),
    ("look-alike refused", "lookalike", "refusal_rate"),
)
LABELS = ("harmful", "benign", "lookalike")
MIN_FIRST = 22  # the first column holds names, folded where longer; beside it the main columns fit into 80


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


def behaviour_table(behaviour: Mapping[str, Any], judge: str = "strict", skipped: int = 0) -> None:
    """Print rates by arm, in per cent with 95% intervals: what is refused, what is done and what was no action."""
    labels = {label for rates in behaviour.values() for label in rates}
    main, more = ([c for c in columns if c[1] in labels] for columns in (MAIN_COLUMNS, MORE_COLUMNS))
    rows = []
    for arm, rates in behaviour.items():
        cells = [percent(rates.get(label, {}).get(judge, {}).get(name)) for _, label, name in (*main, *more)]
        sizes = [str(rates[label][judge]["refusal_rate"]["n"]) for label in LABELS if label in rates]
        n = sizes[0] if len(set(sizes)) == 1 else "/".join(sizes)
        rows.append([arm, *cells[: len(main)], _invalid(rates, judge), n, *cells[len(main) :]])
    titles = [[title for title, _, _ in columns] for columns in (main, more)]
    print_table(
        ["arm", *titles[0], "invalid", "n", *titles[1]], rows,
        f"per cent [95% interval], judge: {judge}; n (of each label) and invalid: harmful/benign/look-alike",
        skipped,
    )  # fmt: skip


def said_missing(impossible: Mapping[str, str], missing: Mapping[str, Mapping[str, str]]) -> None:
    """What the table leaves out, below it: arms that this model cannot be given, and tasks without an outcome."""
    width = shutil.get_terminal_size((80, 24)).columns
    for arm, reason in impossible.items():
        typer.echo(textwrap.fill(f"{arm}: not possible here: {reason}", width))
    alike: dict[tuple[str, ...], list[str]] = {}  # the same page is too long under every arm: one line says it
    for arm, reasons in missing.items():
        alike.setdefault(tuple(sorted(reasons)), []).append(arm)
    for arms in alike.values():
        named = ", ".join(arms[:3]) + (f" and {len(arms) - 3} more arms" if len(arms) > 3 else "")
        task, reason = next(iter(missing[arms[0]].items()))
        lost = len(missing[arms[0]])
        typer.echo(
            textwrap.fill(
                f"{named}: {lost} task{'s are' if lost > 1 else ' is'} missing from every rate; {task}: {reason}", width
            )
        )


def _invalid(rates: Mapping[str, Any], judge: str) -> str:
    """Answers that were no action, by label; a model that only fails to act is no safe one."""
    cells = (rates[label][judge].get("invalid_rate") for label in LABELS if label in rates)
    return "/".join("–" if not c or c["value"] is None else f"{100 * c['value']:.0f}" for c in cells)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", skipped: int = 0) -> None:
    """Print to stdout as plain text, never markup, no line wider than the terminal (80 where there is none).

    Columns that do not fit go into a further block under the first column's names; names are folded, never cut, and
    a cell is only folded where it alone is wider than the terminal.

    Args:
        skipped: rows of the inputs that no number here rests on, because they could not be read.
    """
    width = shutil.get_terminal_size((80, 24)).columns
    columns = [[str(cell) for cell in column] for column in zip(header, *rows, strict=True)]
    first, others = columns[0], columns[1:]
    room = sum(_natural(column) + 2 for column in others)
    first_width = min(max(map(cell_len, first)), max(MIN_FIRST, width - room))
    blocks: list[list[tuple[list[str], int]]] = [[]]
    used = first_width
    for column in others:
        own = min(_natural(column), max(8, width - first_width - 2))
        if blocks[-1] and used + 2 + own > width:
            blocks.append([])
            used = first_width
        blocks[-1].append((column, own))
        used += 2 + own
    for i, block in enumerate(blocks):
        if i:
            typer.echo("")
        _print_block([(first, first_width), *block])
    if skipped:
        caption = "; ".join(filter(None, (caption, f"{skipped} bad records skipped")))
    if caption:
        typer.echo(textwrap.fill(caption, width))
    typer.echo("")


def print_texts(texts: Mapping[str, str]) -> None:
    """What the names of a table stand for, whole: name, then its text, folded under itself."""
    width = shutil.get_terminal_size((80, 24)).columns
    for name, text in texts.items():
        plain = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
        typer.echo(textwrap.fill(f"{name}  {plain}", width, subsequent_indent=" " * (len(name) + 2)))
    typer.echo("")


def _natural(column: Sequence[str]) -> int:
    """A column is as wide as its widest cell; its title is folded at spaces."""
    words = max((cell_len(word) for word in column[0].split()), default=1)
    return max(1, words, *map(cell_len, column[1:])) if len(column) > 1 else max(1, words)


def _print_block(block: Sequence[tuple[Sequence[str], int]]) -> None:
    for i, cells in enumerate(zip(*(column for column, _ in block), strict=True)):
        folded = [_fold(cell, width) for cell, (_, width) in zip(cells, block, strict=True)]
        for line in range(max(map(len, folded))):
            parts = [part[line] if line < len(part) else "" for part in folded]
            padded = [
                _pad(part, width, left=j == 0) for j, (part, (_, width)) in enumerate(zip(parts, block, strict=True))
            ]
            typer.echo("  ".join(padded).rstrip())
        if i == 0:
            typer.echo("  ".join("─" * width for _, width in block))


def _fold(text: str, width: int) -> list[str]:
    plain = "".join(char if char.isprintable() else " " for char in text)
    if cell_len(plain) <= width:
        return [plain]
    narrow = width if cell_len(plain) == len(plain) else max(1, width // 2)  # wide characters take two cells each
    return textwrap.wrap(plain, narrow, break_on_hyphens=False) or [""]


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(text))
    return text + space if left else space + text
