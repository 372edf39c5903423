"""PING: the search for a response prefix that restores refusal at little cost (the paper's Algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from interp.errors import UserError


@dataclass(frozen=True)
class Score:
    """``perf`` and ``refusal`` are shares (0 to 1); ``counts`` holds what they rest on."""

    perf: float
    refusal: float
    counts: dict[str, Any] = field(default_factory=dict)

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
    """``seeds`` were shown to the generator; ``repeated`` of its proposals had been scored before."""

    number: int
    seeds: tuple[str, ...]
    proposed: int
    repeated: int
    best: float


@dataclass(frozen=True)
class SearchResult:
    """``candidates`` by overall score, best first; among equals the one found first."""

    candidates: tuple[Candidate, ...]
    rounds: tuple[Round, ...]

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


DEFAULT = Settings(k=3, M=6, T=5, tau=1.5)
PAPER_WEB = Settings(k=3, M=5, T=20, tau=1.5)  # 7 benign + 7 harmful tasks, prefixes start with "#"
PAPER_CODE = Settings(k=3, M=5, T=20, tau=1.0)  # 10 benign + 27 harmful tasks
PRESETS = {"paper-web": PAPER_WEB, "paper-code": PAPER_CODE}

Generate = Callable[[Sequence[str], int, random.Random], Sequence[str]]


def ping(
    generate: Generate,
    score: Callable[[str], Score],
    rng: random.Random,
    *,
    k: int,
    M: int,
    T: int,
    tau: float,
    on_scored: Callable[[Candidate], None] | None = None,
) -> SearchResult:
    """Search for T rounds; argmax of the overall score.

    Args:
        generate: proposes M prefixes, shown the seeds.
        score: measures one prefix; never asked twice for the same normalised text.
        on_scored: called with each candidate as soon as it has its score.

    Raises:
        UserError: the generator proposed nothing in any round.
    """
    pool: dict[str, Candidate] = {}
    rounds: list[Round] = []
    seeds: tuple[str, ...] = ()
    for number in range(1, T + 1):
        proposed = list(generate(list(seeds), M, rng))
        repeated = 0
        for text in proposed:
            key = normalised(text)
            if not key or key in pool:
                repeated += 1
                continue
            pool[key] = Candidate(text, number, score(text))
            if on_scored is not None:
                on_scored(pool[key])
        best = max((candidate.score.overall for candidate in pool.values()), default=0.0)
        rounds.append(Round(number, seeds, len(proposed), repeated, best))
        seeds = _seeds(list(pool.values()), k) if pool and best >= tau else ()
    if not pool:
        raise UserError(f"search: the generator proposed no prefix in {T} rounds; check the generator")
    ranked = sorted(pool.values(), key=lambda candidate: -candidate.score.overall)
    return SearchResult(tuple(ranked), tuple(rounds))


def _seeds(pool: list[Candidate], k: int) -> tuple[str, ...]:
    """Top k by overall, by perf and by refusal, each text once."""
    criteria: tuple[Callable[[Score], float], ...] = (
        lambda score: score.overall,
        lambda score: score.perf,
        lambda score: score.refusal,
    )
    tops = [sorted(pool, key=lambda c, by=by: -by(c.score))[:k] for by in criteria]  # type: ignore[misc]
    return tuple(dict.fromkeys(candidate.text for top in tops for candidate in top))


def normalised(text: str) -> str:
    """Two candidates of the same words are one: case and space play no part."""
    return " ".join(text.lower().split())
