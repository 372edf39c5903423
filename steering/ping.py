"""PING: the search for a response prefix that restores refusal at little cost (the paper's Algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pingscope.interp.errors import UserError


@dataclass(frozen=True)
class Score:
    """``perf`` and ``refusal`` are shares (0 to 1); ``counts`` holds what they rest on.

    ``complete``: measured on all tasks. A score that a race broke off is an estimate and never wins.
    """

    perf: float
    refusal: float
    counts: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def overall(self) -> float:
        """At most 2."""
        return self.perf + self.refusal


@dataclass(frozen=True)
class Candidate:
    """A prefix with its score, and the round (from 1) that proposed it."""

    text: str
    round: int
    score: Score

    def to_dict(self) -> dict[str, Any]:
        score = asdict(self.score) | {"overall": self.score.overall}
        return {"text": self.text, "round": self.round, **score}


@dataclass(frozen=True)
class Round:
    """``seeds`` were shown to the generator; ``repeated`` of its proposals had been proposed before, ``dropped``
    were new and left without a score.
    """

    number: int
    seeds: tuple[str, ...]
    proposed: int
    repeated: int
    dropped: int
    best: float


@dataclass(frozen=True)
class SearchResult:
    """``candidates`` by overall score, best first, complete scores before estimates; among equals the one found
    first. ``notes``: what the scorer has to say about its work.
    """

    candidates: tuple[Candidate, ...]
    rounds: tuple[Round, ...]
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "rounds": [asdict(one) for one in self.rounds],
        }


@dataclass(frozen=True)
class Settings:
    """k seeds a criterion, M candidates a round, T rounds; below ``tau`` the seeds are emptied."""

    k: int
    M: int
    T: int
    tau: float

    def __post_init__(self) -> None:
        for name in ("k", "M", "T"):
            if getattr(self, name) < 1:
                raise UserError(f"search: {name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True)
class Preset:
    """A published search: its settings, how many harmful and benign tasks, and whether prefixes start with ``#``."""

    settings: Settings
    harmful: int
    benign: int
    comment: bool


DEFAULT = Settings(k=3, M=6, T=5, tau=1.5)
PAPER_WEB = Settings(k=3, M=5, T=20, tau=1.5)
PAPER_CODE = Settings(k=3, M=5, T=20, tau=1.0)
PRESETS = {
    "paper-web": Preset(PAPER_WEB, harmful=7, benign=7, comment=True),
    "paper-code": Preset(PAPER_CODE, harmful=27, benign=10, comment=False),
}

Generate = Callable[[Sequence[str], int, random.Random], Sequence[str]]
Scorer = Callable[[Sequence[str]], Sequence[Score | None]]


def ping(
    generate: Generate,
    score: Scorer,
    rng: random.Random,
    *,
    k: int,
    M: int,
    T: int,
    tau: float,
    on_scored: Callable[[Candidate], None] | None = None,
    over: Callable[[], bool] | None = None,
) -> SearchResult:
    """Search for T rounds; argmax of the overall score.

    Args:
        generate: proposes M prefixes, shown the seeds.
        score: measures the new prefixes of a round, None for those it leaves out; never asked twice for the same
            normalised text.
        on_scored: called with each candidate that has its score.
        over: true once the budget is spent: no further round begins.

    Raises:
        UserError: the generator proposed nothing in any round, or the budget ended before the first score.
    """
    pool: list[Candidate] = []
    seen: set[str] = set()
    rounds: list[Round] = []
    seeds: tuple[str, ...] = ()
    for number in range(1, T + 1):
        if over is not None and over():
            break
        proposed = list(generate(list(seeds), M, rng))
        new = []
        for text in proposed:
            if normalised(text) and normalised(text) not in seen:
                seen.add(normalised(text))
                new.append(text)
        found = [Candidate(text, number, s) for text, s in zip(new, score(new), strict=True) if s is not None]
        pool += found
        for candidate in found if on_scored is not None else ():
            on_scored(candidate)  # type: ignore[misc]
        best = max((candidate.score.overall for candidate in pool if candidate.score.complete), default=0.0)
        rounds.append(Round(number, seeds, len(proposed), len(proposed) - len(new), len(new) - len(found), best))
        seeds = _seeds(pool, k) if pool and best >= tau else ()
    if not pool:
        if over is not None and over():
            raise UserError("search: the budget ended before the first score; raise it")
        account = getattr(generate, "account", None)  # of generators that can say what went wrong
        why = account() if account is not None else "check the generator"
        raise UserError(f"search: the generator proposed no prefix in {T} rounds; {why}")
    ranked = sorted(pool, key=lambda candidate: (not candidate.score.complete, -candidate.score.overall))
    return SearchResult(tuple(ranked), tuple(rounds))


def _seeds(pool: list[Candidate], k: int) -> tuple[str, ...]:
    """Top k by overall, by perf and by refusal, each text once."""
    criteria: tuple[Callable[[Score], float], ...] = (
        lambda score: score.overall,
        lambda score: score.perf,
        lambda score: score.refusal,
    )
    # Complete scores first: the best of many estimates on a few tasks are mostly the lucky ones.
    tops = [
        sorted(pool, key=lambda c, by=by: (not c.score.complete, -by(c.score)))[:k]  # type: ignore[misc]
        for by in criteria
    ]
    return tuple(dict.fromkeys(candidate.text for top in tops for candidate in top))


def normalised(text: str) -> str:
    """Two candidates of the same words are one: case and space play no part."""
    return " ".join(text.lower().split())
