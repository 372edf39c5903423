"""Successive halving: many settings on few tasks, few settings on many tasks (Jamieson and Talwalkar, 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

K = TypeVar("K")

SHARES = (0.1, 0.3, 1.0)  # of the tasks, by round
KEPT = (1 / 3, 0.12)  # of the settings, after each round but the last
FEWEST = 4  # tasks per label in the first round


@dataclass(frozen=True)
class Halved(Generic[K]):
    """The winner, every value measured by round, and how many task runs it took against a full sweep."""

    winner: K
    value: float
    rounds: list[dict[str, Any]] = field(default_factory=list)
    spent: int = 0
    full: int = 0

    def to_dict(self, name: Callable[[K], str]) -> dict[str, Any]:
        """JSON form, settings by name."""
        rounds = [
            {"n": one["n"], "values": {name(setting): value for setting, value in one["values"]}} for one in self.rounds
        ]
        return {"winner": name(self.winner), "value": self.value, "rounds": rounds} | {
            "spent": self.spent,
            "full": self.full,
        }


def halve(
    settings: Sequence[K],
    value: Callable[[K, int], float],
    n: int,
    *,
    cost: Callable[[K], float] = lambda setting: 0.0,
    exhaustive: bool = False,
) -> Halved[K]:
    """The setting with the largest value on ``n`` tasks, most others being dropped on fewer.

    Args:
        value: of a setting on the first so many tasks (of each label); larger is better. Tasks are nested, so one
            that keeps its answers runs none twice.
        cost: among equal values the cheaper setting wins, then the earlier one.
        exhaustive: run everything on all tasks, the sweep that the halving is compared with.
    """
    sizes = [n] if exhaustive else sorted({max(min(FEWEST, n), math.ceil(share * n)) for share in SHARES})
    alive, rounds, spent, before = list(settings), [], 0, 0
    for number, size in enumerate(sizes):
        spent += len(alive) * (size - before)
        before = size
        values = [(setting, value(setting, size)) for setting in alive]
        rounds.append({"n": size, "values": values})
        ranked = sorted(values, key=lambda one: (-one[1], cost(one[0])))
        share = KEPT[min(number, len(KEPT) - 1)]
        wanted = 1 if size == n else max(2, math.floor(share * len(settings)))
        alive = [setting for setting, _ in ranked[:wanted]]
        best = ranked[0]
    return Halved(best[0], best[1], rounds, spent, n * len(settings))
