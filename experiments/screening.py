"""Spending generations where they matter: a score that generates nothing ranks prefixes, and races end early.

The cheap score reads the first token after a prefix: how much more the model leans to refusing on harmful tasks than on
the others. A race runs the prefixes that are left on one block of tasks after another and drops those that are behind
at a confidence stated beforehand. Both are checked against what they replace: the rank correlation of the cheap score
with the true one is measured, and where it is poor every prefix is raced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from experiments.agents.judges import token_classes
from experiments.agents.records import Record
from experiments.prefix_table import Perf, PrefixTable, TaskOutcome
from interp.chat import Rendered
from interp.errors import UserError
from interp.prefixed import PrefixRenderer
from interp.shared_prefill import SharedPrefill
from probes.statistics import Estimate
from steering.injection import Arm
from steering.ping import Score, normalised

Cheap = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Screen:
    """How a search saves generations.

    Attributes:
        propose: prefixes proposed for each of a round's M. The cheap score costs no generation, so it may choose from
            many; until it is trusted, the first M are run.
        keep: prefixes that it lets through, as a share of M, once it is trusted.
        trust: smallest Spearman correlation of the cheap score with the true one, on at least ``learn`` prefixes.
        block: tasks per label of the first stage of a race; each further stage doubles what was run.
        delta: probability, per prefix, that a race drops one that is better than the best by more than ``margin``.
        margin: an overall score that much higher is not worth a race (0.01: one point).
        cheap_tasks: tasks per label that the cheap score reads.
    """

    propose: int = 4
    keep: float = 0.5
    trust: float = 0.5
    learn: int = 6
    block: int = 8
    delta: float = 0.05
    margin: float = 0.01
    cheap_tasks: int = 24

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.delta < 1 or min(self.block, self.cheap_tasks, self.propose) < 1:
            raise UserError(
                "screening: keep and delta lie between 0 and 1; propose, block and cheap_tasks are positive"
            )


class Screened:
    """Scores rounds of prefixes (a ``Scorer`` of :func:`steering.ping.ping`): cheap ranking, then a race.

    Attributes:
        cheap: the cheap score of every prefix proposed, by normalised text.
        dropped: how many prefixes ended without a generation, and in a race.
    """

    def __init__(self, table: PrefixTable, perf: Perf, screen: Screen, cheap: Cheap | None, seed: int = 0) -> None:
        self.table, self.perf, self.screen, self.rank_by = table, perf, screen, cheap
        self.stages = race_stages(table.records, screen.block, seed)
        self.cheap: dict[str, float] = {}
        self.texts: dict[str, str] = {}  # everything generated for
        self.dropped = {"by the cheap score": 0, "in a race": 0}
        self.best: str | None = None

    def __call__(self, texts: Sequence[str]) -> list[Score | None]:
        if self.rank_by is not None:
            self.cheap |= dict(zip(map(normalised, texts), self.rank_by(texts), strict=True))
        running = self._let_through(texts)
        self.dropped["by the cheap score"] += len(texts) - len(running)
        self.texts |= {normalised(text): text for text in running}
        for stage, tasks in enumerate(self.stages):
            if not running or not self.table.measure(dict.fromkeys(running, tasks)):
                break
            if stage + 1 < len(self.stages):
                kept = self._ahead(running)
                self.dropped["in a race"] += len(running) - len(kept)
                running = kept
        scores = [self.table.score(text, self.perf) for text in texts]
        for text, score in zip(texts, scores, strict=True):
            if score is not None and score.complete and score.overall > self._best_overall():
                self.best = text
        return scores

    def correlation(self) -> Estimate:
        """Spearman's correlation of the cheap score with the measured one, over the prefixes generated for."""
        pairs = [(self.cheap[key], score.overall) for key, score in self._scored() if key in self.cheap]
        return spearman([a for a, _ in pairs], [b for _, b in pairs])

    def trusted(self) -> bool:
        """Whether the cheap score has shown that it ranks as the true one does; until then nothing is left out."""
        if self.rank_by is None:
            return False
        found = self.correlation()
        return found.n >= self.screen.learn and found.value >= self.screen.trust

    def _scored(self) -> list[tuple[str, Score]]:
        found = [(key, self.table.score(text, self.perf)) for key, text in self.texts.items()]
        return [(key, score) for key, score in found if score is not None]

    def _let_through(self, texts: Sequence[str]) -> list[str]:
        wanted = len(texts) / self.screen.propose  # M of a full round
        if not self.trusted():
            return list(texts[: math.ceil(wanted)])
        ranked = sorted(texts, key=lambda text: -self.cheap[normalised(text)])
        return ranked[: math.ceil(self.screen.keep * wanted)]

    def _best_overall(self) -> float:
        score = None if self.best is None else self.table.score(self.best, self.perf)
        return -1.0 if score is None else score.overall

    def _ahead(self, running: Sequence[str]) -> list[str]:
        """Prefixes that may still beat the best one: so far, or of this race."""
        outcomes = {text: self.table.outcomes(text) for text in running}

        def so_far(text: str) -> float:
            score = self.table.score(text, self.perf)
            return -1.0 if score is None else score.overall

        leader = max(running, key=so_far)
        rivals = {leader: outcomes[leader]}
        if self.best is not None:
            rivals[self.best] = self.table.outcomes(self.best)
        looks = max(1, len(self.stages) - 1) * len(rivals)
        return [
            text
            for text in running
            if all(
                text == rival
                or upper_bound(outcomes[text], theirs, self.table.records, self.perf, self.screen.delta / looks)
                > self.screen.margin
                for rival, theirs in rivals.items()
            )
        ]


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
) -> float:
    """One-sided upper limit, at confidence 1 - alpha, of our overall score minus theirs on the tasks of both.

    Paired differences of proportions with half a pair added to each of the four cells (Agresti and Min 2005), which
    keeps an interval where all pairs agree; harmful and other tasks are two strata whose variances add up.
    """
    difference, variance = 0.0, 0.0
    for harmful in (True, False):
        up = down = n = 0
        for i in ours.keys() & theirs.keys():
            if (records[i].label == "harmful") is not harmful:
                continue
            a, b = (_point(o, harmful, perf) for o in (ours[i], theirs[i]))
            if a is not None and b is not None:
                n, up, down = n + 1, up + (a > b), down + (a < b)
        if not n:
            return math.inf
        difference += (up - down) / (n + 2)
        variance += (up + down + 1 - (up - down) ** 2 / (n + 2)) / (n + 2) ** 2
    return difference + NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance)


def _point(outcome: TaskOutcome, harmful: bool, perf: Perf) -> bool | None:
    if harmful:
        return outcome.refused
    return outcome.success if perf == "success" else not outcome.refused


def first_token_scores(
    engine: SharedPrefill,
    render: PrefixRenderer,
    records: Sequence[Record],
    n: int,
    examples: Mapping[str, Sequence[str]] | None = None,
) -> Cheap:
    """The cheap score from the first token after a prefix: no token is generated.

    The log-odds of refusal starts against action and comment starts at the decision, as a probability, are averaged
    over ``n`` tasks per side; the score is harmful minus the others, at most 1.
    """
    classes = token_classes(engine.model.tokenizer, **(examples or {}))
    yes, no = list(classes["refusal"]), [*classes["action"], *classes["comment"]]
    if not yes or not no:
        raise UserError("screening: no token begins a refusal or an action; give examples in the model's words")
    chosen = [
        record for harmful in (True, False) for record in [r for r in records if (r.label == "harmful") is harmful][:n]
    ]
    harmful = torch.tensor([record.label == "harmful" for record in chosen])

    def score(texts: Sequence[str]) -> list[float]:
        logits = engine.next_token_logits(_rows(render, chosen, texts))
        odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
        leaning = odds.sigmoid().view(len(texts), len(chosen))
        return (leaning[:, harmful].mean(-1) - leaning[:, ~harmful].mean(-1)).tolist()

    return score


def probe_scores(model: Any, render: PrefixRenderer, probes: Any, records: Sequence[Record], n: int) -> Cheap:
    """The cheap score from a probe: its final-token logit, harmful minus the other tasks, in units of its spread.

    The layer is the middle one of those that have a probe.
    """
    layer = probes.layers[len(probes.layers) // 2]
    w = torch.from_numpy(np.asarray(probes.directions[list(probes.layers).index(layer)], dtype=np.float32))
    chosen = [
        record for harmful in (True, False) for record in [r for r in records if (r.label == "harmful") is harmful][:n]
    ]
    harmful = torch.tensor([record.label == "harmful" for record in chosen])

    def score(texts: Sequence[str]) -> list[float]:
        from interp.selection import final

        rows = _rows(render, chosen, texts)
        found = torch.cat(model.residuals(rows, [layer], where=final())[layer]).float().cpu() @ w
        logits = found.view(len(texts), len(chosen))
        gap = logits[:, harmful].mean(-1) - logits[:, ~harmful].mean(-1)
        return (gap / logits.std().clamp(min=1e-6)).tolist()

    return score


def _rows(render: PrefixRenderer, records: Sequence[Record], texts: Sequence[str]) -> list[Rendered]:
    return [render(Arm("", prefix=text).apply(record.prompt())) for text in texts for record in records]


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
