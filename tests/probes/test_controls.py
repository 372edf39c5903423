from __future__ import annotations

import numpy as np
import pytest

from probes.controls import evaluate, text_baselines


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(160) % 2
    x = rng.standard_normal((160, 10))
    x[:, 2] += 3 * y
    return x, y, np.arange(160) // 2


def test_a_planted_signal_is_found_and_the_controls_find_nothing(data) -> None:
    x, y, groups = data
    rng = np.random.default_rng(9)
    found = evaluate({1: x, 2: rng.standard_normal(x.shape)}, y, groups=list(groups), transfer={1: -x, 2: x})
    signal, noise = found[1], found[2]
    assert signal["auroc"].ci[0] > 0.9 and signal["accuracy"].ci[0] > 0.8 and signal["tpr_at_1fpr"].value > 0.3
    assert signal["transfer_auroc"].ci[1] < 0.1  # read on mirrored activations, the same probes are wrong
    for control in (signal["shuffled_auroc"], noise["auroc"], noise["shuffled_auroc"]):
        assert control.ci[0] < 0.5 < control.ci[1] or abs(control.value - 0.5) < 0.1
    assert signal["random_auroc"].ci[1] < signal["auroc"].ci[0]
    assert signal["random_auroc"].n == 100


def test_evaluation_is_held_out() -> None:
    # As many features as rows: in sample every labelling is separable; out of fold there is nothing to find.
    rng = np.random.default_rng(1)
    draws = {layer: rng.standard_normal((60, 100)) for layer in range(8)}
    found = [row["auroc"].value for row in evaluate(draws, np.arange(60) % 2).values()]
    assert abs(np.mean(found) - 0.5) < 0.12


def test_near_copies_do_not_leak_across_folds() -> None:
    rng = np.random.default_rng(2)
    y = np.repeat(rng.integers(2, size=30), 4)
    x = np.repeat(rng.standard_normal((30, 40)), 4, axis=0) + 0.01 * rng.standard_normal((120, 40))
    groups = np.repeat(np.arange(30), 4)
    assert evaluate({0: x}, y)[0]["auroc"].value > 0.9  # each prompt's copy was in training
    assert evaluate({0: x}, y, groups=groups)[0]["auroc"].value < 0.75


def test_too_few_groups_gives_missing_not_a_number() -> None:
    found = evaluate({0: np.eye(4)}, [0, 1, 0, 1], groups=["a", "a", "a", "a"])[0]
    assert all(np.isnan(found[name].value) for name in ("auroc", "accuracy", "shuffled_auroc", "random_auroc"))
    assert found["auroc"].n_missing == 4


def test_text_baselines_see_words_and_length() -> None:
    rng = np.random.default_rng(3)
    y = np.arange(80) % 2
    words = [f"{'steal' if label else 'borrow'} the {rng.choice(['car', 'book', 'pen'])}" for label in y]
    same = text_baselines(words, y, lengths=[3] * 80)
    assert same["words_auroc"].value == 1.0 and same["length_auroc"].value == 0.5
    long = text_baselines(["the car"] * 80, y, lengths=(5 + 3 * y + rng.integers(2, size=80)).tolist())
    assert long["length_auroc"].value > 0.95 and long["words_auroc"].value == 0.5
