from __future__ import annotations

import numpy as np
import pytest

from pingscope.probes.controls import calibration, evaluate, permute_within, text_baselines, transfer_back
from pingscope.probes.logistic import folds


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
    assert same["words_auroc"].value == 1.0 and same["tokens_auroc"].value == 0.5
    long = text_baselines(["the car"] * 80, y, lengths=(5 + 3 * y + rng.integers(2, size=80)).tolist())
    assert long["tokens_auroc"].value > 0.95 and long["words_auroc"].value == long["length_auroc"].value == 0.5
    wide = text_baselines(["the car" + " " * (2 * label) for label in y], y, lengths=[3] * 80)
    assert wide["length_auroc"].value == 1.0 and wide["tokens_auroc"].value == wide["words_auroc"].value == 0.5


def test_transfer_goes_both_ways() -> None:
    rng = np.random.default_rng(5)
    y = np.arange(120) % 2
    here, there = rng.standard_normal((2, 120, 6))
    here[:, 0] += 4 * y
    there[:, 1] += 4 * y  # the other model keeps the signal elsewhere
    both = here.copy()
    both[:, 1] += 4 * y
    assert transfer_back({0: here}, {0: there}, y)[0].value < 0.7
    assert transfer_back({0: both}, {0: there}, y)[0].ci[0] > 0.9
    # Out of fold: with nothing to find, training on the very same prompts finds nothing.
    noise = rng.standard_normal((120, 200))
    assert abs(transfer_back({0: noise}, {0: noise}, y)[0].value - 0.5) < 0.2


def test_calibration_is_small_for_true_probabilities_and_large_for_bold_ones() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 2000)
    y = rng.random(2000) < 1 / (1 + np.exp(-logits))
    true, bold = calibration(logits, y), calibration(5 * logits, y)
    assert true["calibration_error"].value < 0.05 < 0.1 < bold["calibration_error"].value
    assert true["brier"].value < bold["brier"].value
    assert true["calibration_error"].ci[0] <= true["calibration_error"].value


def test_a_new_kind_of_harm_is_not_found_by_a_probe_of_another() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((240, 6))
    y = np.arange(240) % 2
    kinds = np.where(y == 1, np.where(np.arange(240) % 4 == 1, "a", "b"), "")
    x[kinds == "a", 0] += 4
    x[kinds == "b", 1] += 4
    found = evaluate({0: x}, y, categories=list(kinds))[0]
    assert found["auroc"].value > 0.95  # both kinds were in training
    assert found["category_auroc"].value < 0.7 and found["category_worst"].value <= found["category_auroc"].value
    x[y == 1, 2] += 4  # what both share carries over
    shared = evaluate({0: x}, y, categories=list(kinds))[0]
    assert shared["category_worst"].value > 0.9
    assert "category_auroc" not in evaluate({0: x}, y, categories=["a"] * 240)[0]


@pytest.mark.parametrize("width", [20, 350])
def test_means_and_nested_choice_of_c(width) -> None:
    """The signal is spread over all coordinates, as in a residual stream: both directions must find it, held out."""
    rng = np.random.default_rng(4)
    y, groups = np.arange(260) % 2, np.arange(260) // 2
    noise = rng.standard_normal((260, width))
    x = noise + 6 / np.sqrt(width) * y[:, None]
    found = evaluate({0: x}, y, groups=list(groups), C="cv")[0]
    assert found["auroc"].ci[0] > 0.99 and found["means_auroc"].ci[0] > 0.99
    assert 0.9 < found["means_cosine"].value <= 1 and found["means_cosine"].ci[0] > 0.85
    nothing = evaluate({0: noise}, y, groups=list(groups), C="cv")[0]
    assert (
        nothing["auroc"].value < 0.55
    )  # choosing C within the folds leaks nothing; below 0.5 is cross-validation's own


def test_shuffled_labels_keep_each_folds_share(data) -> None:
    _, y, _ = data
    splits = folds(y == 1, None, 5, 0)
    mixed = permute_within(y == 1, splits, np.random.default_rng(0))
    assert (mixed != (y == 1)).any()
    assert all(mixed[test].sum() == y[test].sum() for _, test in splits)
