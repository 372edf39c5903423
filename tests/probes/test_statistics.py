from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from pingscope.interp.errors import UserError
from pingscope.probes.resampling import jackknife
from pingscope.probes.statistics import (
    Estimate,
    auroc,
    auroc_value,
    column_differences,
    column_means,
    difference,
    mean,
    paired_difference,
    rate,
    tpr_at_fpr,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (51, 60)])
def test_rate_is_wilsons_interval(hits: int, n: int) -> None:
    found = rate([True] * hits + [False] * (n - hits))
    wanted = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert found.value == hits / n
    assert found.ci == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_missing_values_are_counted_and_never_zero() -> None:
    assert rate([True, None, True, math.nan]) == Estimate(1.0, rate([True, True]).ci, 2, 2)
    found = mean([4.0, None, 6.0, math.nan])
    assert (found.value, found.n, found.n_missing) == (5.0, 2, 2)
    pairs = paired_difference([1.0, None, 5.0], [0.0, 9.0, 3.0])
    assert (pairs.value, pairs.n, pairs.n_missing) == (1.5, 2, 1)
    area = auroc([0.1, 0.9, math.nan], [0, 1, 1])
    assert (area.value, area.n, area.n_missing) == (1.0, 2, 1)


def test_nothing_to_estimate_is_null_in_json() -> None:
    for found in (mean([]), rate([None]), auroc([], []), difference([], []), tpr_at_fpr([1.0], [1])):
        row = found.to_dict()
        assert row["value"] is None and row["ci"] == [None, None]
    assert mean([2.0]).to_dict() == {"value": 2.0, "ci": [None, None], "n": 1, "n_missing": 0}


def test_auroc_equals_sklearn_with_ties_and_flips_with_the_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    scores = np.round(rng.normal(size=300) + labels, 1)
    assert auroc(scores, labels).value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc_value(scores, labels) == auroc(scores, labels).value
    assert auroc(scores, 1 - labels).value == pytest.approx(1 - auroc(scores, labels).value)
    assert auroc(np.exp(scores), labels).value == auroc(scores, labels).value
    assert auroc(np.zeros(10), [0, 1] * 5).value == 0.5


def test_sorted_and_pairwise_auroc_agree(monkeypatch) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(2, size=120)
    scores = np.round(rng.normal(size=120) + labels, 1)
    pairwise = auroc(scores, labels), auroc(scores, labels, np.arange(120) // 3)
    monkeypatch.setattr("pingscope.probes.statistics._PAIRWISE", 0)
    for one, other in zip(pairwise, (auroc(scores, labels), auroc(scores, labels, np.arange(120) // 3)), strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-12) and one.ci == pytest.approx(other.ci, abs=1e-12)


def test_tpr_threshold_is_conservative() -> None:
    negatives = np.arange(200.0)  # two of 200 may lie above at 1 %: threshold 197
    found = tpr_at_fpr(np.r_[negatives, 197.0, 197.5, 500.0], np.r_[np.zeros(200), 1, 1, 1], 0.01)
    assert found.value == pytest.approx(2 / 3)
    few = tpr_at_fpr([0.0, 5.0, 5.0, 6.0], [0, 0, 1, 1], 0.01)  # 1 % of two negatives: none, and a tie is negative
    assert few.value == 0.5


def test_tpr_never_exceeds_the_allowed_rate_of_false_positives() -> None:
    rng = np.random.default_rng(1)
    for n in (30, 99, 100, 250):
        scores, labels = np.round(rng.normal(size=2 * n), 1), np.repeat([0, 1], n)
        found = tpr_at_fpr(scores, labels, 0.01).value
        negatives = np.sort(scores[:n])[::-1]
        threshold = negatives[int(0.01 * n + 1e-9)]
        assert (scores[:n] > threshold).mean() <= 0.01
        assert found == pytest.approx((scores[n:] > threshold).mean())


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    inside = {"mean": 0, "auroc": 0, "difference": 0}
    runs = 150
    for i in range(runs):
        a, b = rng.normal(1, 1, 60), rng.normal(0, 1, 60)
        for name, value, found in (
            ("mean", 1.0, mean(a, seed=i)),
            ("difference", 1.0, difference(a, b, seed=i)),
            ("auroc", truth, auroc(np.r_[a, b], np.repeat([1, 0], 60), seed=i)),
        ):
            inside[name] += found.ci[0] <= value <= found.ci[1]
    assert all(0.88 <= hits / runs <= 0.99 for hits in inside.values()), inside


def test_groups_widen_the_interval_of_dependent_rows() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(20), 10)
    values = np.repeat(rng.normal(size=20), 10) + 0.01 * rng.normal(size=200)
    width = lambda found: found.ci[1] - found.ci[0]  # noqa: E731
    assert width(mean(values, groups=groups)) > 2 * width(mean(values))
    own = mean(values, groups=np.arange(200))
    assert own.ci == pytest.approx(mean(values).ci, rel=0.2)


def test_a_group_that_carries_one_class_is_redrawn_not_nan() -> None:
    found = auroc([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0], groups=["a", "a", "b", "b"])
    assert found.value == 1.0 and found.ci == (1.0, 1.0)


def test_same_seed_same_interval_and_identities() -> None:
    values = np.random.default_rng(4).normal(size=700)  # more than one cached block
    assert mean(values) == mean(values)
    assert mean(values) != mean(values, seed=1)
    assert paired_difference(values, values).ci == (0.0, 0.0)
    shifted = difference(values + 3, values - 0, seed=5)
    assert shifted.value == pytest.approx(3)
    matrix = np.stack([values[:50], np.where(np.arange(50) < 20, math.nan, values[:50])], 1)
    full, part = column_means(matrix)
    assert full.ci == pytest.approx(mean(values[:50]).ci)
    assert (part.n, part.n_missing) == (30, 20) and part.value == pytest.approx(values[20:50].mean())


def test_wrong_input_is_refused() -> None:
    for call in (
        lambda: rate([0.5]),
        lambda: auroc([1.0], [1, 0]),
        lambda: auroc([1.0, 2.0], [2, 0]),
        lambda: tpr_at_fpr([1.0], [1], 1.5),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: mean([1.0, 2.0], groups=["a"]),
    ):
        with pytest.raises(UserError):
            call()


def test_column_differences_are_those_of_single_columns() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1.0, (60, 4)), rng.normal(0.0, 1.0, (40, 4))
    a[5:, 1] = np.nan  # few rows reach it
    b[1:, 2] = np.nan  # one row: a value without an interval
    b[:, 3] = np.nan  # nobody
    full, few, one, none = column_differences(a, b)
    alone = difference(a[:, 0], b[:, 0])
    assert full.value == pytest.approx(alone.value) and (full.n, full.n_missing) == (100, 0)
    assert full.ci == pytest.approx(alone.ci, abs=0.06)
    assert few.value == pytest.approx(a[:5, 1].mean() - b[:, 1].mean()) and (few.n, few.n_missing) == (45, 55)
    assert few.ci[1] - few.ci[0] > 1.2 * (full.ci[1] - full.ci[0])
    assert one.value == pytest.approx(a[:, 2].mean() - b[0, 2]) and np.isnan(one.ci[0])
    assert np.isnan(none.value) and np.isnan(none.ci[0]) and none.n == 60


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)

    def average(weights: np.ndarray) -> np.ndarray:
        return (weights @ values) / weights.sum(1)

    assert jackknife(average, 50) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    pairs = np.repeat(np.arange(25), 2)
    means = values.reshape(25, 2).mean(1)
    assert jackknife(average, 50, groups=pairs) == pytest.approx(means.std(ddof=1) / np.sqrt(25))
    assert math.isnan(jackknife(average, 50, groups=np.zeros(50, int)))
