"""Reading 5: did the basis move, or is the signal gone?

A fine-tuned model may keep the signal in directions that the base's probe does not read. So its activations
are first mapped onto the base's, with a map fitted on the same prompts run through both models. No label is
used, neither to fit the map nor to choose its family: the reconstruction of held-out prompts decides. If the
gap comes back under the map the basis had moved; if it stays away the signal is gone from that position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from pingscope.probes.resampling import Groups, codes

RANK = 16
FOLDS = 5

Map = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Realigned:
    """Activations (n, d_model) in the base's space, each by a map that was fitted without its group."""

    features: np.ndarray
    family: str  # offset | diagonal | low_rank
    explained: float  # share of the base's variance that the held-out reconstruction explains


def realign(tuned: np.ndarray, base: np.ndarray, *, groups: Groups = None, seed: int = 0) -> Realigned | None:
    """Map ``tuned`` (n, d_model) onto ``base``, the same prompts in the same order; ``None`` when too few."""
    own = np.arange(len(base)) if groups is None else codes(groups)
    k = min(FOLDS, len(set(own)))
    if k < 2:
        return None
    # With one prompt a group the plain splitter is the same; both shuffle, so prompt order cannot matter.
    kind = KFold if len(set(own)) == len(own) else GroupKFold
    splits = list(kind(k, shuffle=True, random_state=seed).split(base, groups=None if kind is KFold else own))
    spread = float(((base - base.mean(0)) ** 2).sum())
    best: tuple[float, str, np.ndarray] | None = None
    for family, fit in FAMILIES.items():
        mapped = np.empty_like(base)
        for train, test in splits:
            mapped[test] = fit(tuned[train], base[train])(tuned[test])
        error = float(((mapped - base) ** 2).sum())
        # A richer family has to earn its place: rounding alone must not choose it.
        if best is None or error < best[0] - 1e-6 * spread:
            best = (error, family, mapped)
    assert best is not None
    return Realigned(best[2], best[1], 1 - best[0] / spread if spread else float("nan"))


def offset(x: np.ndarray, y: np.ndarray) -> Map:
    """y = x + c."""
    shift = y.mean(0) - x.mean(0)
    return lambda new: new + shift


def diagonal(x: np.ndarray, y: np.ndarray) -> Map:
    """y = a * x + c, each coordinate on its own, ridge towards a = 1."""
    centre, target = x.mean(0), y.mean(0)
    spread = x.var(0)
    ridge = 1e-2 * spread.mean() + 1e-12
    gain = 1 + ((x - centre) * (y - target - (x - centre))).mean(0) / (spread + ridge)
    return lambda new: target + gain * (new - centre)


def low_rank(x: np.ndarray, y: np.ndarray) -> Map:
    """y = x + B T x + c: a ridge update of the identity that reads the leading principal components of x."""
    centre, target = x.mean(0), y.mean(0)
    rank = max(1, min(RANK, len(x) // 4))
    axes = np.linalg.svd(x - centre, full_matrices=False)[2][:rank]
    scores = (x - centre) @ axes.T
    ridge = 1e-2 * (scores**2).sum() / rank + 1e-12
    update = np.linalg.solve(scores.T @ scores + ridge * np.eye(len(axes)), scores.T @ (y - target - (x - centre)))
    return lambda new: target + (new - centre) + ((new - centre) @ axes.T) @ update


FAMILIES = {"offset": offset, "diagonal": diagonal, "low_rank": low_rank}
