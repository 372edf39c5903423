"""Estimates with confidence intervals: the one place where a number gets its uncertainty.

Every function returns an :class:`Estimate`: value, 95 % interval, how many values it rests on, how many
were missing. ``None`` and NaN mean *missing*: they are counted and left out, never taken as 0. With nothing
to estimate the value is NaN, ``None`` in JSON; with a single value (or a single group) there is no interval.

Intervals of rates are Wilson's. All others are percentile bootstraps over rows or, with ``groups``, whole
groups (cluster bootstrap: give the pair or template that rows share).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pingscope.interp.errors import UserError
from pingscope.probes.resampling import NO_INTERVAL, Groups, Weights, blocks_of_weights, bootstrap, codes

Values = Iterable[Any] | np.ndarray  # numbers, truth values, None
_PAIRWISE = 2048  # rows up to which an AUROC compares all pairs instead of sorting
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; ``n`` values were used and ``n_missing`` were not there."""

    value: float
    ci: tuple[float, float]
    n: int
    n_missing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form: NaN (nothing to estimate, no interval) becomes ``None``."""
        low, high = (_finite(bound) for bound in self.ci)
        return {"value": _finite(self.value), "ci": [low, high], "n": self.n, "n_missing": self.n_missing}


def exponential(estimate: Estimate) -> Estimate:
    """A mean of logarithms as a geometric mean: of negative log-likelihoods in nats, the perplexity."""
    low, high = (math.exp(bound) for bound in estimate.ci)
    return replace(estimate, value=math.exp(estimate.value), ci=(low, high))


def rate(values: Values) -> Estimate:
    """Share of true values, with Wilson's interval (sound at 0 and 100 %, where a bootstrap has no width)."""
    array = as_floats(values)
    present = array[~np.isnan(array)]
    n, missing = len(present), len(array) - len(present)
    if not n:
        return Estimate(math.nan, NO_INTERVAL, 0, missing)
    if not np.isin(present, (0.0, 1.0)).all():
        raise UserError("rate: values must be true, false or missing; use mean for numbers")
    p, z2 = float(present.mean()), Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding must not push an exact end inside: 0 of n starts at 0, n of n ends at 1.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(p, (0.0 if p == 0 else low, 1.0 if p == 1 else high), n, missing)


def mean(values: Values, *, groups: Groups = None, seed: int = 0) -> Estimate:
    """Mean over the values that are there."""
    array = as_floats(values)
    here = ~np.isnan(array)
    data, n = array[here], int(here.sum())
    if not n:
        return Estimate(math.nan, NO_INTERVAL, 0, len(array))
    ci = bootstrap(lambda w: (w @ data) / w.sum(1), n, groups=_taken(groups, here), seed=seed)
    return Estimate(float(data.mean()), ci, n, len(array) - n)


def column_means(values: np.ndarray, *, seed: int = 0) -> list[Estimate]:
    """:func:`mean` of every column of (row, column) values with NaN as missing, rows resampled together."""
    counts = (~np.isnan(values)).sum(0)
    return _columns(_column_values(values), _drawn_means(values, seed), counts, counts >= 2, len(values))


def column_differences(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> list[Estimate]:
    """Mean of ``a`` minus mean of ``b``, two samples of rows with the same columns and NaN as missing.

    A column that one of the two never reaches is NaN; the interval needs two rows on either side. ``n`` counts both.
    """
    first, second = ((~np.isnan(values)).sum(0) for values in (a, b))
    drawn = _drawn_means(a, seed) - _drawn_means(b, seed + 1)
    known = np.minimum(first, second) >= 2
    return _columns(_column_values(a) - _column_values(b), drawn, first + second, known, len(a) + len(b))


def _column_values(values: np.ndarray) -> np.ndarray:
    here = ~np.isnan(values)
    sums, counts = np.where(here, values, 0.0).sum(0), here.sum(0)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _drawn_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of the columns in every resample of the rows: (resample, column)."""
    here = ~np.isnan(values)
    filled = np.where(here, values, 0.0)
    samples = []
    for weights in blocks_of_weights(len(values), seed=seed):
        there = weights @ here
        samples.append(np.divide(weights @ filled, there, out=np.full(there.shape, np.nan), where=there > 0))
    return np.concatenate(samples)


def _columns(points: np.ndarray, drawn: np.ndarray, counts: np.ndarray, known: np.ndarray, rows: int) -> list[Estimate]:
    low, high = np.full((2, len(points)), math.nan)
    if known.any():
        low[known], high[known] = np.nanpercentile(drawn[:, known], (2.5, 97.5), axis=0)
    return [
        Estimate(float(point), (float(a), float(b)), int(n), int(rows - n))
        for point, a, b, n in zip(points, low, high, counts, strict=True)
    ]


def column_gaps(values: np.ndarray, positive: np.ndarray, *, groups: Groups = None, seed: int = 0) -> list[Estimate]:
    """Mean of positive rows minus mean of the others, for every column of (row, column), resampled together.

    Rows with a missing value are left out of every column: the columns are parts of one whole.
    """
    here = ~np.isnan(values).any(1)
    data, side, n = values[here], np.asarray(positive, bool)[here], int(here.sum())
    missing = len(values) - n
    if not side.any() or side.all():
        return [Estimate(math.nan, NO_INTERVAL, n, missing)] * values.shape[1]
    taken = _taken(groups, here)
    low = high = np.full(values.shape[1], math.nan)
    if taken is None or len(set(taken)) > 1:
        drawn = [gap(weights, data, side) for weights in blocks_of_weights(n, groups=taken, strata=side, seed=seed)]
        low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5), axis=0)
    point = data[side].mean(0) - data[~side].mean(0)
    return [
        Estimate(float(value), (float(a), float(b)), n, missing) for value, a, b in zip(point, low, high, strict=True)
    ]


def ratio(parts: Values, wholes: Values, *, groups: Groups = None, seed: int = 0) -> Estimate:
    """Mean of ``parts`` over mean of ``wholes``, row by row the same prompts and resampled together.

    NaN where the interval of the whole's mean reaches 0: a share of nothing is no number.
    """
    first, second = as_floats(parts), as_floats(wholes)
    here = ~(np.isnan(first) | np.isnan(second))
    a, b, n = first[here], second[here], int(here.sum())
    missing = len(first) - n
    whole = mean(second, groups=groups, seed=seed)
    if n < 2 or math.isnan(whole.ci[0]) or whole.ci[0] <= 0 <= whole.ci[1]:
        return Estimate(math.nan, NO_INTERVAL, n, missing)
    ci = bootstrap(lambda w: (w @ a) / (w @ b), n, groups=_taken(groups, here), seed=seed)
    return Estimate(float(a.sum() / b.sum()), ci, n, missing)


def difference(
    a: Values,
    b: Values,
    *,
    groups: tuple[Sequence | np.ndarray, Sequence | np.ndarray] | None = None,
    seed: int = 0,
) -> Estimate:
    """mean(a) - mean(b) of two independent samples; ``n`` counts both.

    ``groups`` are those of a and of b: a group with rows in both is drawn as one.
    """
    first, second = as_floats(a), as_floats(b)
    array = np.concatenate([first, second])
    in_a = np.arange(len(array)) < len(first)
    here = ~np.isnan(array)
    data, side, n = array[here], in_a[here], int(here.sum())
    missing = len(array) - n
    if not side.any() or side.all():
        return Estimate(math.nan, NO_INTERVAL, n, missing)
    joined = None if groups is None else [*groups[0], *groups[1]]
    ci = bootstrap(lambda w: gap(w, data, side), n, groups=_taken(joined, here), strata=side, seed=seed)
    return Estimate(float(data[side].mean() - data[~side].mean()), ci, n, missing)


def paired_difference(
    a: Values,
    b: Values,
    *,
    groups: Groups = None,
    seed: int = 0,
) -> Estimate:
    """Mean of a - b over pairs (row i of each); a pair with one half missing is missing."""
    first, second = as_floats(a), as_floats(b)
    if first.shape != second.shape:
        raise UserError(f"paired_difference: {len(first)} and {len(second)} values; give one pair a row")
    return mean(first - second, groups=groups, seed=seed)


def auroc(
    scores: Values,
    labels: Sequence | np.ndarray,
    groups: Groups = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Area under the ROC curve: P(positive scores higher) + half of P(tie). NaN when one class is absent.

    Without groups the resamples are stratified by class; with groups a resample that lost a class is redrawn.
    """
    return _ranked(_auroc_of, scores, labels, groups, seed)


def tpr_at_fpr(
    scores: Values,
    labels: Sequence | np.ndarray,
    fpr: float = 0.01,
    groups: Groups = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Share of positives caught at a false-positive rate of at most ``fpr``.

    The threshold comes from the negatives, conservatively: of m negatives, floor(fpr * m) may lie above it, a
    score equal to the threshold counts as negative, and nothing is interpolated. With fewer than 1 / fpr
    negatives none may: the threshold is the largest negative. Every resample finds its own threshold, so the
    interval covers the choice of threshold too; where few negatives decide it, it leans upwards.
    """
    if not 0 <= fpr < 1:
        raise UserError(f"tpr_at_fpr: fpr is {fpr}; give a rate in [0, 1)")
    return _ranked(lambda w, positive, first: _tpr_of(w, positive, first, fpr), scores, labels, groups, seed)


def auroc_value(scores: np.ndarray, labels: np.ndarray) -> float:
    """The point value of :func:`auroc` alone, for loops over permutations and floor updates."""
    return _point(_auroc_of, np.asarray(scores, np.float64), np.asarray(labels, bool))


def gap(weights: Weights, values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Mean of positives minus mean of negatives, per resample; of every column where ``values`` has columns."""
    up, down = weights[:, positive], weights[:, ~positive]
    sizes = [side.sum(1).reshape(-1, *[1] * (values.ndim - 1)) for side in (up, down)]
    return (up @ values[positive]) / sizes[0] - (down @ values[~positive]) / sizes[1]


def as_floats(values: Values) -> np.ndarray:
    """1-d float64 array with None as NaN."""
    if not isinstance(values, np.ndarray):
        values = [math.nan if value is None else float(value) for value in values]
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"statistics: expected 1-d values, found shape {array.shape}; pass one value a row")
    return array


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _taken(groups: Groups, here: np.ndarray) -> np.ndarray | None:
    if groups is None:
        return None
    if len(groups) != len(here):
        raise UserError(f"statistics: {len(groups)} groups for {len(here)} values; give one group a value")
    return codes(groups)[here]


def _ranked(statistic, scores, labels, groups, seed: int) -> Estimate:
    array, classes = as_floats(scores), np.asarray(labels)
    if len(array) != len(classes):
        raise UserError(f"statistics: {len(array)} scores for {len(classes)} labels; give one label a score")
    if len(classes) and not np.isin(classes, (0, 1)).all():
        raise UserError("statistics: labels must be 0 or 1 (1 = harmful); leave other rows out")
    here = ~np.isnan(array)
    data, positive, n = array[here], classes[here].astype(bool), int(here.sum())
    missing = len(array) - n
    if not positive.any() or positive.all():
        return Estimate(math.nan, NO_INTERVAL, n, missing)
    # Rows sorted by descending score once; ties share a slot, so each statistic is linear in the rows.
    order, first = _slots(data)
    positive = positive[order]
    taken = _taken(groups, here)
    ci = bootstrap(
        lambda w: statistic(w, positive, first),
        n,
        groups=None if taken is None else taken[order],
        strata=positive,
        seed=seed,
    )
    return Estimate(_point(statistic, data[order], positive), ci, n, missing)


def _point(statistic, data: np.ndarray, positive: np.ndarray) -> float:
    order, first = _slots(data)
    return float(statistic(np.ones((1, len(data))), positive[order], first)[0])


def _slots(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-data, kind="stable")
    ranked = data[order]
    return order, np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])


def _per_slot(weights: Weights, positive: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    up, down = weights * positive, weights * ~positive
    if len(first) < weights.shape[1]:
        up, down = np.add.reduceat(up, first, axis=1), np.add.reduceat(down, first, axis=1)
    return up, down


def _auroc_of(weights: Weights, positive: np.ndarray, first: np.ndarray) -> np.ndarray:
    if len(positive) <= _PAIRWISE:
        # Few rows: comparing every pair once and leaving the resamples to BLAS is several times faster.
        slot = np.searchsorted(first, np.arange(len(positive)), side="right")
        above = np.sign(slot[~positive] - slot[positive][:, None]) / 2 + 0.5  # 1 higher, 0.5 tie, 0 lower
        up, down = weights[:, positive], weights[:, ~positive]
        return np.einsum("rn,rn->r", up @ above, down) / (up.sum(1) * down.sum(1))
    up, down = _per_slot(weights, positive, first)
    total = down.sum(1)
    below = total[:, None] - np.cumsum(down, axis=1)  # negatives with a lower score
    return np.einsum("rs,rs->r", up, below + 0.5 * down) / (up.sum(1) * total)


def _tpr_of(weights: Weights, positive: np.ndarray, first: np.ndarray, fpr: float) -> np.ndarray:
    up, down = _per_slot(weights, positive, first)
    allowed = np.floor(fpr * down.sum(1) + 1e-9)  # 1 % of 100 is 1 also in floating point
    caught = np.where(np.cumsum(down, axis=1) <= allowed[:, None], np.cumsum(up, axis=1), 0.0).max(1)
    return caught / up.sum(1)
