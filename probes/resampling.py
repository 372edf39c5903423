"""Bootstrap resamples as weights, shared by every interval.

A resample is a row of weights, how often each observation was drawn, so that a statistic is one vectorised
expression over all resamples. Weights come in blocks of bounded size; small ones are kept, because a study
asks for the same few sizes thousands of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 2000
NO_INTERVAL = (math.nan, math.nan)

_CACHED_BELOW = 512  # a weight matrix of 512 rows is 8 MB
_CELLS = 4_000_000  # weights in a block, whatever the number of rows

Weights = np.ndarray  # (resample, row): how often each row was drawn
Groups = Sequence[Any] | np.ndarray | None  # one name a row: rows of a group belong together


def codes(groups: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Group names as numbers from 0."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def bootstrap(
    statistic: Callable[[Weights], np.ndarray],
    n: int,
    *,
    groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic`` (weights (resample, n) -> (resample,)), RESAMPLES draws.

    Rows are drawn within ``strata``; with ``groups`` whole groups are drawn, again until every stratum has a
    row. A statistic may be NaN on a resample where it is undefined: the interval is that of the others.
    """
    if n < 2 or (groups is not None and len(set(groups)) < 2):
        return NO_INTERVAL
    samples = np.concatenate(
        [statistic(weights) for weights in blocks_of_weights(n, groups=groups, strata=strata, seed=seed)]
    )
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return NO_INTERVAL
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def jackknife(statistic: Callable[[Weights], np.ndarray], n: int, *, groups: np.ndarray | None = None) -> float:
    """Standard error of ``statistic`` from leaving out one row, or one whole group, at a time.

    For statistics that noise pulls to one side, such as the cosine of an estimated direction: a bootstrap adds noise,
    and its percentiles can miss the value itself.
    """
    own = np.arange(n) if groups is None else codes(groups)
    count = int(own.max()) + 1 if n else 0
    if count < 2:
        return math.nan
    size = max(1, _CELLS // n)
    values = np.concatenate(
        [
            statistic((own != np.arange(start, min(start + size, count))[:, None]).astype(np.float64))
            for start in range(0, count, size)
        ]
    )
    values = values[~np.isnan(values)]
    return math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum())) if len(values) else math.nan


def blocks_of_weights(
    n: int,
    *,
    groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    seed: int = 0,
) -> Iterator[Weights]:
    """All resamples of ``n`` rows, in blocks of (resample, n); the same for the same seed."""
    block = max(1, _CELLS // max(1, n))
    for start in range(0, RESAMPLES, block):
        yield _draw(n, min(block, RESAMPLES - start), groups, strata, seed + start)


def _draw(n: int, resamples: int, groups: np.ndarray | None, strata: np.ndarray | None, seed: int) -> Weights:
    if groups is None:
        if strata is None:
            return _counts(n, resamples, seed)
        weights = np.empty((resamples, n))
        for i, stratum in enumerate(np.unique(strata)):
            members = strata == stratum
            weights[:, members] = _counts(int(members.sum()), resamples, seed + 7919 * (i + 1))
        return weights
    index = codes(groups)
    count = int(index.max()) + 1
    weights = _counts(count, resamples, seed)[:, index]
    if strata is None:
        return weights
    sides = [strata == stratum for stratum in np.unique(strata)]
    rng = np.random.default_rng(seed + 104729)
    while (lost := np.any([weights[:, side].sum(1) == 0 for side in sides], axis=0)).any():
        weights[lost] = _multinomial(rng, count, int(lost.sum()))[:, index]
    return weights


def _counts(n: int, resamples: int, seed: int) -> Weights:
    if n <= _CACHED_BELOW:
        return _cached_counts(n, resamples, seed)
    return _multinomial(np.random.default_rng(seed), n, resamples)


@lru_cache(maxsize=16)
def _cached_counts(n: int, resamples: int, seed: int) -> Weights:
    weights = _multinomial(np.random.default_rng(seed), n, resamples)
    weights.setflags(write=False)
    return weights


def _multinomial(rng: np.random.Generator, n: int, resamples: int) -> Weights:
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)
