"""Logistic regression for sweeps: hundreds of fits on the same prompts, each exact.

With fewer prompts than coordinates the solution lies in the span of the prompts, w = Z'a, so everything that a fit
needs of the features is their Gram matrix K = ZZ' (prompt x prompt). It is made once per training fold and shared by
all C, label permutations and controls; a fit is then a few Newton steps with an n x n Cholesky factor each, whatever
the width of the model. The objective is scikit-learn's: |w|²/2 + C Σ log(1 + exp(-y (z·w + b))), intercept free,
features standardised on the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit
from sklearn.preprocessing import StandardScaler

STEPS = 100
TOLERANCE = 1e-12  # expected further decrease, relative to the objective
_HALVINGS = 30
_FAR = 30.0  # logits beyond which a row counts as certain: keeps the weights from underflowing

Splits = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class GramFit:
    """Coefficients over the training rows (they sum to 0), intercept in standardised space, and how the fit ended."""

    alpha: Float[np.ndarray, " row"]
    intercept: float
    objective: float
    steps: int
    converged: bool


class GramSolver:
    """The training rows of one fold, ready to be fitted to any labels at any C."""

    def __init__(self, x: Float[np.ndarray, "row d_model"]) -> None:
        self._scaler = StandardScaler().fit(x)
        self._z = self._scaler.transform(x)
        self.kernel: Float[np.ndarray, "row row"] = self._z @ self._z.T

    def fit(self, positive: Bool[np.ndarray, " row"], C: float, start: GramFit | None = None) -> GramFit:
        """Newton's method with step halving, from zero or from the solution at a neighbouring C."""
        kernel, y = self.kernel, positive.astype(np.float64)
        n = len(y)
        alpha = np.zeros(n) if start is None else start.alpha
        b = 0.0 if start is None else start.intercept
        k_alpha = kernel @ alpha
        f = k_alpha + b
        value = _objective(alpha, k_alpha, f, y, C)
        for step in range(1, STEPS + 1):
            p = expit(np.clip(f, -_FAR, _FAR))
            w = C * p * (1 - p)
            root = np.sqrt(w)
            factor = cho_factor(
                root[:, None] * kernel * root + np.eye(n), lower=True, overwrite_a=True, check_finite=False
            )
            # (I + WK)^-1 of the two right-hand sides, without dividing by weights that may be tiny.
            right = np.stack([w * f + C * (y - p), w], 1)
            solved = right - root[:, None] * cho_solve(factor, root[:, None] * (kernel @ right), check_finite=False)
            new_b = solved[:, 0].sum() / solved[:, 1].sum()
            direction = solved[:, 0] - new_b * solved[:, 1] - alpha
            k_direction, shift = kernel @ direction, new_b - b
            slope = float((alpha + C * (p - y)) @ k_direction + C * (p - y).sum() * shift)
            if -slope <= TOLERANCE * (1.0 + value):
                return GramFit(alpha, b, value, step, True)
            t = 1.0
            for _ in range(_HALVINGS):
                trial = (alpha + t * direction, k_alpha + t * k_direction, f + t * (k_direction + shift))
                lower = _objective(*trial, y, C)
                if lower <= value + 1e-4 * t * slope:
                    break
                t /= 2
            else:  # rounding leaves nothing to gain
                return GramFit(alpha, b, value, step, -slope <= 1e-8 * (1.0 + value))
            (alpha, k_alpha, f), value, b = trial, lower, b + t * shift
        return GramFit(alpha, b, value, STEPS, False)

    def direction(self, fit: GramFit) -> tuple[Float[np.ndarray, " d_model"], float]:
        """Direction and intercept in raw space."""
        w = (self._z.T @ fit.alpha) / self._scaler.scale_
        w[self._scaler.var_ == 0] = 0.0
        return w, float(fit.intercept - w @ self._scaler.mean_)

    def against(self, x: Float[np.ndarray, "new d_model"]) -> Float[np.ndarray, "new row"]:
        """Products of new rows with the training rows: ``against(x) @ alpha + intercept`` are their logits."""
        return np.asarray(self._scaler.transform(x) @ self._z.T)


def sweep(
    x: Float[np.ndarray, "prompt d_model"],
    labels: Bool[np.ndarray, "fit prompt"],
    splits: Splits,
    Cs: Sequence[float],
) -> Float[np.ndarray, "C fit prompt"]:
    """Out-of-fold logits for every C and every row of labels; NaN where a prompt is in no test part.

    A fold whose training part has one class only (under some labels) leaves its test prompts NaN there.
    """
    scores = np.full((len(Cs), *labels.shape), np.nan)
    order = np.argsort(Cs)
    for train, test in splits:
        solver = GramSolver(x[train])
        cross = solver.against(x[test])
        for i, own in enumerate(labels[:, train]):
            if own.all() or not own.any():
                continue
            fit = None
            for c in order:
                fit = solver.fit(own, Cs[c], fit)
                scores[c, i, test] = cross @ fit.alpha + fit.intercept
    return scores


def _objective(alpha: np.ndarray, k_alpha: np.ndarray, f: np.ndarray, y: np.ndarray, C: float) -> float:
    return float(0.5 * alpha @ k_alpha + C * (np.logaddexp(0.0, f) - y * f).sum())
