"""What every benchmark does alike: arms that take turns, ratios within a round, and one table of them.

Machines drift and have neighbours, so no time is compared with one of another round. In a round every arm runs once,
and every other round runs in reverse order. A ratio is taken within the round; its median stands with the narrowest
pair of order statistics that holds the true median with a probability of at least 0.9, and from fewer than five rounds,
which cannot say that, with the least and the largest.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import comb
from pathlib import Path
from typing import Any

import torch

from pingscope.interp.files import atomic_write

COVERAGE = 0.9

Work = Callable[[], Any]
Seconds = dict[str, list[float]]  # of every arm, by round


@dataclass(frozen=True)
class Ratio:
    """One line of a table: ``value`` with its interval, against ``bar`` (from above if ``at_most``)."""

    name: str
    value: float
    low: float
    high: float
    bar: float | None = None
    at_most: bool = True

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        met = self.value <= self.bar if self.at_most else self.value >= self.bar
        return f"{'<=' if self.at_most else '>='} {self.bar:g}: {'met' if met else 'MISSED'}"

    def cells(self) -> tuple[str, ...]:
        span = "" if self.low == self.high else f" [{self.low:.3g}, {self.high:.3g}]"
        return self.name, f"{self.value:.3g}{span}", self.verdict


@dataclass(frozen=True)
class Table:
    """What one benchmark found: a sentence on what ran, ratios, and remarks below them."""

    caption: str
    rows: Sequence[Ratio]
    remarks: Sequence[str] = ()

    def markdown(self) -> str:
        lines = ["| ratio | measured | bar |", "|---|---|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in self.rows]
        return "\n\n".join([self.caption, "\n".join(lines), *self.remarks]) + "\n"


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what is in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one run, the device's queue included."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def turns(rounds: Iterable[Mapping[str, Work]], device: torch.device, *, warm: bool = True) -> Seconds:
    """Seconds of every arm in every round; ``warm`` runs the arms of the first round once before they count."""
    seconds: Seconds = {}
    for number, arms in enumerate(rounds):
        names = list(arms)
        if number == 0 and warm:
            for name in names:
                arms[name]()
        for name in names if number % 2 == 0 else reversed(names):
            seconds.setdefault(name, []).append(timed(arms[name], device))
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics around the median (binomial, distribution-free), at :data:`COVERAGE` or better."""
    ordered, n = sorted(values), len(values)
    outside, skip = 0, 0
    while skip < (n - 1) // 2:
        outside += comb(n, skip)
        if 1 - 2 * (outside + comb(n, skip + 1)) / 2**n < COVERAGE:
            break
        skip += 1
    return ordered[skip], ordered[n - 1 - skip]


def ratio(
    name: str, above: Sequence[float], below: Sequence[float], bar: float | None = None, at_most: bool = True
) -> Ratio:
    """Median of ``above / below`` within each round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(name, statistics.median(found), *interval(found), bar, at_most)


def single(name: str, value: float, bar: float | None = None, at_most: bool = True) -> Ratio:
    """A number that was measured once, such as a peak of memory."""
    return Ratio(name, value, value, value, bar, at_most)


def circumstances(device: torch.device) -> str:
    """Device, threads, load and versions, for a caption."""
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        beside = max(0.0, os.getloadavg()[0] - 1)
        place = f"CPU, {torch.get_num_threads()} threads, about {beside:.1f} other processes running beside"
    names = ("torch", "transformers", "transformer-lens", "nnsight", "scikit-learn")
    return f"{place}; {', '.join(f'{one} {version(one)}' for one in names)}, python {platform.python_version()}"


def publish(table: Table, name: str, docs: Path | None) -> None:
    """Print a table, and put it between the marks ``<!-- name -->`` and ``<!-- end -->`` of a Markdown file.

    Raises:
        ValueError: a file without these marks.
    """
    print(table.markdown())
    if docs is None:
        return
    head, begin, rest = docs.read_text().partition(f"<!-- {name} -->")
    _, end, tail = rest.partition("<!-- end -->")
    if not begin or not end:
        raise ValueError(f"{docs}: no '<!-- {name} -->' … '<!-- end -->' to put the table between")
    atomic_write(docs, f"{head}{begin}\n\n{table.markdown()}\n{end}{tail}")
