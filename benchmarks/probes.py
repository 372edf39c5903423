"""Sweeps of probes: the Gram-space solver against a scikit-learn loop, same fits, same answers.

    python -m benchmarks.probes [--layers 30] [--d 576] [--n 400] [--labellings 2] [--loop 12]

A round is one layer: every fold, C and label permutation (``--labellings``, the true one among them) by the Gram-space
solver, and ``--loop`` of the same fits by scikit-learn; the ratio is of seconds a fit. Features are made: correlated,
with a few large coordinates as a residual stream has, and a weak signal.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import Table, Work, circumstances, publish, ratio, turns
from pingscope.probes.gram import GramSolver
from pingscope.probes.logistic import C_GRID, folds

GRAM, LOOP = "Gram-space Newton", "scikit-learn"
CPU = torch.device("cpu")


def features(n: int, d: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and labels of one layer."""
    rng = np.random.default_rng(layer)
    positive = np.arange(n) % 2 == 0
    x = rng.standard_normal((n, 64)) @ rng.standard_normal((64, d)) + 2 * rng.standard_normal((n, d))
    x[:, :5] *= 50
    return x + 0.3 * positive[:, None] * rng.standard_normal(d), rng.permutation(positive)


@dataclass
class Layer:
    """The fits of one layer, by either way, and what their objectives came to."""

    number: int
    n: int
    d: int
    labellings: int
    loop: int
    ours: dict[tuple[int, int, float], float] = field(default_factory=dict)  # objective by fold, labelling and C
    theirs: dict[tuple[int, int, float], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x, positive = features(self.n, self.d, self.number)
        rng = np.random.default_rng(self.number)
        self.labels = [positive, *(rng.permutation(positive) for _ in range(self.labellings - 1))]
        self.splits = folds(positive, None, 5, 0)
        every = [(f, l, C) for f in range(len(self.splits)) for l in range(self.labellings) for C in C_GRID]
        self.fits, self.timed = len(every), [every[i] for i in rng.permutation(len(every))[: self.loop]]

    def gram(self) -> None:
        for f, (train, _) in enumerate(self.splits):
            solver = GramSolver(self.x[train])
            for l, own in enumerate(self.labels):
                fit = None
                for C in C_GRID:
                    fit = solver.fit(own[train], C, fit)
                    self.ours[f, l, C] = fit.objective

    def scikit_learn(self) -> None:
        for f, l, C in self.timed:
            train = self.splits[f][0]
            y, z = self.labels[l][train], StandardScaler().fit_transform(self.x[train])
            model = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(z, y)
            w, logits = model.coef_[0], z @ model.coef_[0] + model.intercept_[0]
            self.theirs[f, l, C] = 0.5 * w @ w + C * float((np.logaddexp(0, logits) - y * logits).sum())

    def gap(self) -> float:
        """Largest excess of our objective over scikit-learn's, of the fits that both made."""
        return max(self.ours[key] - value for key, value in self.theirs.items())


def measure(layers: int, n: int, d: int, labellings: int, loop: int) -> Table:
    """One round a layer."""
    sweep = [Layer(number, n, d, labellings, loop) for number in range(layers)]

    def rounds() -> Iterator[dict[str, Work]]:
        for layer in sweep:
            yield {GRAM: layer.gram, LOOP: layer.scikit_learn}

    seconds = turns(rounds(), CPU)
    each = {
        GRAM: [took / layer.fits for took, layer in zip(seconds[GRAM], sweep, strict=True)],
        LOOP: [took / len(layer.timed) for took, layer in zip(seconds[LOOP], sweep, strict=True)],
    }
    total = sum(layer.fits for layer in sweep)
    caption = (
        f"{layers} layers x {d}, n = {n}: {total} fits (5 folds x {len(C_GRID)} C x {labellings} labellings a layer); "
        f"one round a layer; {circumstances(CPU)}."
    )
    remark = (
        f"{GRAM} {sum(seconds[GRAM]):.1f} s for all, {1000 * np.median(each[GRAM]):.1f} ms a fit; {LOOP} "
        f"{1000 * np.median(each[LOOP]):.0f} ms a fit ({sum(len(layer.timed) for layer in sweep)} timed). Objective, "
        f"ours minus scikit-learn's: at most {max(layer.gap() for layer in sweep):.1e} (bar 1e-8)."
    )
    return Table(caption, [ratio(f"{LOOP} / {GRAM}, a fit", each[LOOP], each[GRAM], 5, False)], [remark])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--labellings", type=int, default=2)
    parser.add_argument("--loop", type=int, default=12, help="fits a layer that scikit-learn makes")
    parser.add_argument("--docs", type=Path, default=None, help="Markdown file whose marked part is replaced")
    given = parser.parse_args()
    table = measure(given.layers, given.n, given.d, given.labellings, given.loop)
    publish(table, "benchmarks.probes", given.docs)


if __name__ == "__main__":
    main()
