"""The Gram-space solver gives scikit-learn's solution, and sweeps give what separate fits give."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pingscope.probes.gram import GramSolver, sweep
from pingscope.probes.logistic import folds


def wide(n=60, d=300, gap=1.0, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    x = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + rng.uniform(-50, 50, d)
    x[:, 0] += gap * positive * x[:, 0].std()
    return x, positive


def objective(z, y, w, b, C):
    f = z @ w + b
    return 0.5 * w @ w + C * (np.logaddexp(0, f) - y * f).sum()


@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0, 1e3])
@pytest.mark.parametrize("gap", [0.0, 5.0])
def test_same_solution_as_scikit_learn(C, gap):
    x, positive = wide(gap=gap)
    solver = GramSolver(x)
    fit = solver.fit(positive, C)
    assert fit.converged
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500).fit(z, positive)
    w = model.coef_[0] / scaler.scale_
    b = model.intercept_[0] - w @ scaler.mean_
    ours, intercept = solver.direction(fit)
    assert ours == pytest.approx(w, rel=1e-5, abs=1e-5 * np.abs(w).max())
    assert intercept == pytest.approx(b, rel=1e-5, abs=1e-5)
    theirs = objective(z, positive, model.coef_[0], model.intercept_[0], C)
    assert fit.objective == pytest.approx(objective(z, positive, ours * scaler.scale_, fit.intercept, C), abs=1e-8)
    assert fit.objective <= theirs + 1e-8
    assert abs(fit.alpha.sum()) < 1e-8 * max(1, C)


def test_a_start_changes_the_way_and_not_the_solution():
    x, positive = wide()
    solver = GramSolver(x)
    near = solver.fit(positive, 0.03)
    cold, warm = solver.fit(positive, 0.1), solver.fit(positive, 0.1, near)
    assert warm.alpha == pytest.approx(cold.alpha, abs=1e-8) and warm.intercept == pytest.approx(cold.intercept)
    assert warm.steps < cold.steps


def test_sweep_is_the_loop_over_folds_labels_and_c():
    x, positive = wide()
    rng = np.random.default_rng(1)
    labels = np.stack([positive, rng.permutation(positive)])
    splits = folds(positive, None, 3, 0)
    scores = sweep(x, labels, splits, (1.0, 0.01))
    for c, C in enumerate((1.0, 0.01)):
        for i, own in enumerate(labels):
            for train, test in splits:
                scaler = StandardScaler().fit(x[train])
                model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500)
                model.fit(scaler.transform(x[train]), own[train])
                wanted = model.decision_function(scaler.transform(x[test]))
                assert scores[c, i, test] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_constant_coordinates_and_one_sided_folds():
    x, positive = wide()
    x[:, 3] = 7.0
    w, _ = GramSolver(x).direction(GramSolver(x).fit(positive, 0.1))
    assert w[3] == 0.0 and np.isfinite(w).all()
    one_sided = np.zeros_like(positive)
    one_sided[0] = True
    splits = [(np.arange(1, 60), np.array([0])), (np.arange(0, 30), np.arange(30, 60))]
    scores = sweep(x, one_sided[None], splits, (0.1,))
    assert np.isnan(scores[0, 0, 0]) and np.isfinite(scores[0, 0, 30:]).all()
