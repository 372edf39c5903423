"""Progress bars for long work: on a terminal a live bar, elsewhere the stage lines only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Advance(Protocol):
    """Move the bar by ``n``; ``info`` is shown beside it; ``title`` and ``total`` start the bar's next part."""

    def __call__(self, n: int = 1, /, *, info: str = "", title: str = "", total: int | None = None) -> None: ...


def say(line: str) -> None:
    """One plain line on stderr; stdout is kept for results. Markup in the text is shown, never interpreted."""
    console.print(line, markup=False, emoji=False)


@contextmanager
def bar(title: str, total: int | None) -> Iterator[Advance]:
    """A bar for the length of the block."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, current = progress.add_task(title, total=total, info=""), title

        def advance(n: int = 1, /, *, info: str = "", title: str = "", total: int | None = None) -> None:
            nonlocal task, current
            if title and title != current:
                progress.remove_task(task)
                task, current = progress.add_task(title, total=total, info=info), title
            progress.update(task, advance=n, info=info, total=total)

        yield advance


def hide_weight_bars() -> None:
    """Loading and saving weights draws a bar per folder; downloads from the hub keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
