"""Spending generations where they matter: a score that generates nothing ranks prefixes, and races end early.

The cheap score (:mod:`experiments.studies.search.cheap_scores`) is how much more the model leans to refusing on
harmful tasks than on the
others. A race runs the prefixes that are left on one block of tasks after another and drops those that are behind
at a confidence stated beforehand. Both are checked against what they replace: the rank correlation of the cheap score
with the true one is measured, and where it is poor every prefix is raced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from pingscope.experiments.studies.search.cheap_scores import Cheap
from pingscope.experiments.studies.search.prefix_table import Perf, PrefixTable, TaskOutcome
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.probes.statistics import Estimate
from pingscope.steering.ping import Score, normalised

DOUBT = 4  # values that a prior variance counts as


@dataclass(frozen=True)
class Screen:
    """How a search saves generations.

    Attributes:
        propose: prefixes proposed for each of a round's M. The cheap score costs no generation, so it may choose from
            many; until it is trusted, M of all its ranks are run.
        keep: prefixes that it lets through, as a share of M, once it is trusted.
        trust: what the lower end of Spearman's correlation of the cheap score with the true one must reach, on at
            least ``learn`` prefixes.
        block: tasks per label of the first stage of a race; each further stage doubles what was run.
        delta: probability, per prefix, that a race drops one that is better than the best by more than ``margin``.
        margin: an overall score that much higher is not worth a race (0.01: one point).
        cheap_tasks: tasks per side that the cheap score reads to rank all prefixes proposed; the better ones are read
            on three times as many, those that are run on all.
    """

    propose: int = 8
    keep: float = 0.15
    trust: float = 0.2
    learn: int = 6
    block: int = 8
    delta: float = 0.15
    margin: float = 0.01
    cheap_tasks: int = 12

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.delta < 1 or min(self.block, self.cheap_tasks, self.propose) < 1:
            raise UserError(
                "screening: keep and delta lie between 0 and 1; propose, block and cheap_tasks are positive"
            )


class Screened:
    """Scores rounds of prefixes (a ``Scorer`` of :func:`pingscope.steering.ping.ping`): cheap ranking, then a race.

    Attributes:
        cheap: the cheap score of every prefix proposed, by normalised text.
        dropped: how many prefixes ended without a generation, and in a race.
    """

    def __init__(self, table: PrefixTable, perf: Perf, screen: Screen, cheap: Cheap | None, seed: int = 0) -> None:
        self.table, self.perf, self.screen, self.rank_by = table, perf, screen, cheap
        self.stages = race_stages(table.records, screen.block, seed)
        self.harmful = np.array([record.label == "harmful" for record in table.records])
        self.cheap: dict[str, float] = {}
        self.texts: dict[str, str] = {}  # everything generated for
        self.leaning: dict[str, np.ndarray] = {}  # of those, on every task
        self.dropped = {"by the cheap score": 0, "in a race": 0}
        self.best: str | None = None

    def __call__(self, texts: Sequence[str]) -> list[Score | None]:
        running = self._let_through(texts)
        self.dropped["by the cheap score"] += len(texts) - len(running)
        self.texts |= {normalised(text): text for text in running}
        if self.rank_by is not None and running:
            found = self._read(running, range(len(self.harmful)))
            self.leaning |= {normalised(text): row for text, row in zip(running, found, strict=True)}
        for stage, tasks in enumerate(self.stages):
            if not running or not self.table.measure(dict.fromkeys(running, tasks)):
                break
            if stage + 1 < len(self.stages):
                kept = self._ahead(running)
                self.dropped["in a race"] += len(running) - len(kept)
                running = kept
        scores = [self.table.score(text, self.perf) for text in texts]
        for text, score in zip(texts, scores, strict=True):
            if score is not None and score.complete and score.overall > self._overall(self.best):
                self.best = text
        return scores

    def correlation(self) -> Estimate:
        """Spearman's correlation of the cheap score with the measured one, over the prefixes generated for."""
        pairs = [(self.cheap[key], score.overall) for key, score in self._scored() if key in self.cheap]
        return spearman([a for a, _ in pairs], [b for _, b in pairs])

    def trusted(self) -> bool:
        """Whether the cheap score has shown that it ranks as the true one does; until then it chooses nothing."""
        if self.rank_by is None:
            return False
        found = self.correlation()
        return found.n >= self.screen.learn and found.ci[0] >= self.screen.trust

    def _read(self, texts: Sequence[str], tasks: Sequence[int]) -> Float[np.ndarray, "prefix task"]:
        """Leanings on these tasks; what a prefix leans more on harmful tasks than on others is its cheap score."""
        assert self.rank_by is not None
        found, harmful = self.rank_by(texts, tasks), self.harmful[list(tasks)]
        gaps = found[:, harmful].mean(1) - found[:, ~harmful].mean(1)
        self.cheap |= {normalised(text): float(gap) for text, gap in zip(texts, gaps, strict=True)}
        return found

    def _ranked(self, texts: Sequence[str], per_side: int) -> list[str]:
        tasks = [int(i) for side in (True, False) for i in np.flatnonzero(self.harmful == side)[:per_side]]
        if texts:
            self._read(texts, tasks)
        return sorted(texts, key=lambda text: -self.cheap[normalised(text)])

    def _scored(self) -> list[tuple[str, Score]]:
        found = [(key, self.table.score(text, self.perf)) for key, text in self.texts.items()]
        return [(key, score) for key, score in found if score is not None]

    def _let_through(self, texts: Sequence[str]) -> list[str]:
        wanted = math.ceil(len(texts) / self.screen.propose)  # M of a full round
        if self.rank_by is None or not texts:
            return list(texts[:wanted])
        ranked = self._ranked(texts, self.screen.cheap_tasks)
        if not self.trusted():
            # From the first rank to the last, denser at the top: prefixes of one kind would not show whether it ranks.
            last = len(ranked) - 1
            return [ranked[max(i, round((i / max(1, wanted - 1)) ** 2 * last))] for i in range(wanted)]
        keep = math.ceil(self.screen.keep * wanted)
        closer = ranked[: round(math.sqrt(keep * len(ranked)))]  # halfway down, they are read on more tasks
        return self._ranked(closer, 3 * self.screen.cheap_tasks)[:keep]

    def _overall(self, text: str | None) -> float:
        score = None if text is None else self.table.score(text, self.perf)
        return -1.0 if score is None else score.overall

    def _ahead(self, running: Sequence[str]) -> list[str]:
        """Prefixes that may still beat the best one: so far, or of this race."""
        leader = max(running, key=self._overall)
        rivals = {leader, self.best or leader}
        alpha = self.screen.delta / (max(1, len(self.stages) - 1) * len(rivals))
        doubt = self._doubt()
        return [
            text
            for text in running
            if all(text == rival or self._upper(text, rival, alpha, doubt) > self.screen.margin for rival in rivals)
        ]

    def _upper(self, ours: str, theirs: str, alpha: float, doubt: float) -> float:
        lean = [self.leaning.get(normalised(text)) for text in (ours, theirs)]
        guess = None if lean[0] is None or lean[1] is None else lean[0] - lean[1]
        mine, other = self.table.outcomes(ours), self.table.outcomes(theirs)
        return upper_bound(mine, other, self.table.records, self.perf, alpha, guess=guess, doubt=doubt)

    def _doubt(self) -> float:
        """Mean square of what the leanings leave unexplained of a paired difference, over the whole search."""
        errors = []
        for key, text in self.texts.items():
            for i, outcome in self.table.outcomes(text).items() if key in self.leaning else ():
                point = _point(outcome, bool(self.harmful[i]), self.perf)
                if point is not None:
                    expected = self.leaning[key][i] if self.harmful[i] else 1 - self.leaning[key][i]
                    errors.append((float(point) - expected) ** 2)
        # Two prefixes err together rather than apart, so twice the error of one is on the safe side.
        return 2 * float(np.mean(errors)) if len(errors) >= 64 else 0.25


def race_stages(records: Sequence[Record], block: int, seed: int = 0) -> list[list[int]]:
    """Task indices of each stage, every label in it in its share; stages 2, 3, … double what was run before."""
    rng = np.random.default_rng(seed)
    sides = [[i for i, r in enumerate(records) if (r.label == "harmful") is harmful] for harmful in (True, False)]
    sides = [[side[j] for j in rng.permutation(len(side))] for side in sides]
    longest = max(map(len, sides))
    ends, end = [], block
    while end < longest:
        ends.append(end)
        end *= 2
    ends.append(longest)
    stages, before = [], 0
    for end in ends:
        cuts = [(round(len(side) * before / longest), round(len(side) * end / longest)) for side in sides]
        stages.append([i for side, (low, high) in zip(sides, cuts, strict=True) for i in side[low:high]])
        before = end
    return [stage for stage in stages if stage]


def upper_bound(
    ours: Mapping[int, TaskOutcome],
    theirs: Mapping[int, TaskOutcome],
    records: Sequence[Record],
    perf: Perf,
    alpha: float,
    *,
    guess: Float[np.ndarray, " task"] | None = None,
    doubt: float = 0.25,
) -> float:
    """One-sided upper limit, at confidence 1 - alpha, of our overall score minus theirs on all tasks.

    Paired differences on the tasks run by both; harmful and other tasks are two strata whose variances add up. Tasks
    are drawn without replacement, so the variance shrinks to nothing as they run out.

    Args:
        guess: by task, how much more ours leans to refusal than theirs. It is known for every task and takes the
            place of those not run; what is estimated is only its error (prediction-powered inference). It is left
            out where it explains nothing of the tasks that were run.
        doubt: prior mean square of one difference, which counts as :data:`DOUBT` tasks: a few tasks that agree do
            not prove that all do.
    """
    difference, variance = 0.0, 0.0
    for harmful in (True, False):
        side = [i for i, record in enumerate(records) if (record.label == "harmful") is harmful]
        found = {}
        for i in side:
            a, b = (_point(o[i], harmful, perf) if i in o else None for o in (ours, theirs))
            if a is not None and b is not None:
                found[i] = float(a) - float(b)
        n = len(found)
        if not n:
            return math.inf
        plain = np.array(list(found.values()))
        expected = np.zeros(len(records)) if guess is None else guess if harmful else -guess
        rest = plain - expected[list(found)]
        if (rest**2).sum() >= (plain**2).sum():
            expected, rest = np.zeros(len(records)), plain
        difference += float(expected[side].mean() + rest.mean())
        square = (((rest - rest.mean()) ** 2).sum() + DOUBT * doubt) / (n + DOUBT)
        variance += square / n * (1 - n / len(side))
    return difference + NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance)


def _point(outcome: TaskOutcome, harmful: bool, perf: Perf) -> bool | None:
    if harmful:
        return outcome.refused
    return outcome.success if perf == "success" else not outcome.refused


def spearman(a: Sequence[float], b: Sequence[float], seed: int = 0, draws: int = 1000) -> Estimate:
    """Rank correlation with a percentile bootstrap interval over the pairs; NaN below three of them."""
    from scipy.stats import rankdata

    x, y = np.asarray(a, float), np.asarray(b, float)
    n = len(x)

    def at(index: np.ndarray) -> float:
        u, v = rankdata(x[index]), rankdata(y[index])
        if u.std() == 0 or v.std() == 0:
            return math.nan
        return float(np.corrcoef(u, v)[0, 1])

    if n < 3:
        return Estimate(math.nan, (math.nan, math.nan), n)
    rng = np.random.default_rng(seed)
    found = np.array([at(rng.integers(n, size=n)) for _ in range(draws)])
    found = found[~np.isnan(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return Estimate(at(np.arange(n)), (float(low), float(high)), n)
