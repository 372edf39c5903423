"""Sweeps of probes: the Gram-space solver against a scikit-learn loop, same fits, same answers.

    python -m benchmarks.probes [--n 300] [--d 4096] [--fits 600]

Fits are folds x C x label permutations of one layer at one position. Prints seconds, the ratio, and the largest gap
between the two objectives.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pingscope.probes.gram import GramSolver
from pingscope.probes.logistic import C_GRID, folds


def data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features with a few large coordinates, as a residual stream has, and a weak signal."""
    rng = np.random.default_rng(seed)
    positive = np.arange(n) % 2 == 0
    x = rng.standard_normal((n, 64)) @ rng.standard_normal((64, d)) + 2 * rng.standard_normal((n, d))
    x[:, :5] *= 50
    return x + 0.3 * positive[:, None] * rng.standard_normal(d), rng.permutation(positive)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--fits", type=int, default=600)
    parser.add_argument("--loop", type=int, default=0, help="fits of the scikit-learn loop that are timed (0: all)")
    given = parser.parse_args()
    x, positive = data(given.n, given.d)
    splits = folds(positive, None, 5, 0)
    rng = np.random.default_rng(1)
    many = max(1, given.fits // (len(splits) * len(C_GRID)))
    labels = [positive, *(rng.permutation(positive) for _ in range(many - 1))]
    total = len(splits) * len(C_GRID) * len(labels)

    started = time.perf_counter()
    ours = []
    for train, _ in splits:
        solver = GramSolver(x[train])
        for own in labels:
            fit = None
            for C in C_GRID:
                fit = solver.fit(own[train], C, fit)
                ours.append(fit.objective)
    gram = time.perf_counter() - started

    timed = min(total, given.loop or total)
    pick = set(rng.choice(total, timed, replace=False).tolist())
    gaps, number, loop = [], 0, 0.0
    for train, _ in splits:
        for own in labels:
            for C in C_GRID:
                if number in pick:
                    started = time.perf_counter()
                    z = StandardScaler().fit_transform(x[train])
                    model = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(z, own[train])
                    loop += time.perf_counter() - started
                    f = z @ model.coef_[0] + model.intercept_[0]
                    value = 0.5 * model.coef_[0] @ model.coef_[0] + C * (np.logaddexp(0, f) - own[train] * f).sum()
                    gaps.append(ours[number] - value)
                number += 1
    loop *= total / timed
    print(f"{total} fits, n = {given.n}, d = {given.d}, {len(splits)} folds x {len(C_GRID)} C x {len(labels)} labels")
    print(f"Gram-space Newton   {gram:8.2f} s   {1000 * gram / total:7.2f} ms a fit")
    print(f"scikit-learn loop   {loop:8.2f} s   {1000 * loop / total:7.2f} ms a fit   ({timed} timed)")
    print(f"ratio {loop / gram:.1f}; objective, ours minus scikit-learn's: at most {max(gaps):.1e}")


if __name__ == "__main__":
    main()
