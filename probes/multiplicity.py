"""Many tests at once: p-values, and which of them stand when a share of the finds may be false.

Layers, positions, components and heads are all looked at, so a 5 % level would call something significant in any
model. Wherever the package says "significant" or "beyond the floor", it is after false discovery control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pingscope.probes.resampling import Groups, codes
from pingscope.probes.statistics import Estimate

Q = 0.05  # share of false finds that is accepted


def false_discovery(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """q-values (Benjamini and Hochberg 1995): the least false discovery rate at which each would be a find.

    Holds under positive dependence, as between layers and positions of one model. NaN (not tested) stays NaN and
    does not count.
    """
    p = np.asarray(p, np.float64)
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(-p[tested], kind="stable")]
    ranks = np.arange(len(order), 0, -1)
    q[order] = np.minimum(1.0, np.minimum.accumulate(p[order] * len(order) / ranks))
    return q


def p_beyond(estimate: Estimate, limit: float, side: int) -> float:
    """One-sided p-value that the true value is not beyond ``limit`` (``side`` +1: above it, -1: below).

    From the estimate's own interval, taken as normal: its half width is 1.96 standard errors.
    """
    low, high = estimate.ci
    if math.isnan(low) or math.isnan(limit):
        return math.nan
    distance = side * (estimate.value - limit)
    # The end that faces the limit: percentile intervals are often skewed.
    error = ((estimate.value - low) if side > 0 else (high - estimate.value)) / 1.959963984540054
    if error <= 0:
        return 0.0 if distance > 0 else 1.0
    return 0.5 * math.erfc(distance / error / math.sqrt(2))


def permuted_gaps(
    values: np.ndarray, positive: np.ndarray, *, groups: Groups = None, permutations: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p, low, high) per column of (row, column): how often shuffled labels give as large a gap, and their 95 % range.

    The gap is mean of positives minus mean of the others; p is two-sided and never 0. With ``groups``, labels move
    with whole groups where each group has one label, else row by row.
    """
    positive, rng = np.asarray(positive, bool), np.random.default_rng(seed)
    own = np.arange(len(positive)) if groups is None else codes(groups)
    first = np.unique(own, return_index=True)[1]
    whole = bool((positive == positive[first][own]).all())
    unit, labels = (own, positive[first]) if whole else (np.arange(len(positive)), positive)
    draws = np.stack([rng.permutation(labels)[unit] for _ in range(permutations)])
    draws = draws[draws.any(1) & ~draws.all(1)]
    up = draws / draws.sum(1, keepdims=True) - ~draws / (~draws).sum(1, keepdims=True)
    null = up @ values
    observed = values[positive].mean(0) - values[~positive].mean(0)
    p = (1 + (np.abs(null) >= np.abs(observed) - 1e-12).sum(0)) / (1 + len(null))
    low, high = np.percentile(null, (2.5, 97.5), axis=0)
    return p, low, high
