"""Held-out evaluation of probes, with the controls that a reading needs beside it.

Everything is out of fold: each prompt is scored by a probe that saw neither it nor any prompt of its group.
The controls answer: would a probe trained on shuffled labels do as well, would a random direction or the plain
difference of means, does the probe carry over to kinds of harm it never saw and to the other model, and do the
prompt's length or its bare words already tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from pingscope.probes.logistic import C_DEFAULT, checked, choose_c, fit_direction, folds, is_harmful, score_sweep
from pingscope.probes.resampling import NO_INTERVAL, Groups, Weights, bootstrap, codes, jackknife
from pingscope.probes.statistics import Z95, Estimate, auroc, auroc_value, mean, rate, tpr_at_fpr

FOLDS = 5
SHUFFLES = 3
RANDOM_DIRECTIONS = 100
BINS = 10  # of the calibration error, equally filled
FEWEST = 5  # harmful prompts of a category that can be held out


@dataclass(frozen=True)
class CrossFit:
    """One probe a fold; :meth:`scores` reads every prompt with the probe that was not trained on it."""

    splits: list[tuple[np.ndarray, np.ndarray]]
    directions: list[np.ndarray]
    intercepts: list[float]

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Out-of-fold logits (n,) of features (n, d_model) of the same prompts, of this model or another."""
        out = np.full(len(x), np.nan)
        for (_, test), w, b in zip(self.splits, self.directions, self.intercepts, strict=True):
            out[test] = x[test] @ w + b
        return out


def cross_fit(
    x: np.ndarray,
    positive: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    C: float | Literal["cv"] = C_DEFAULT,
    groups: Groups = None,
    seed: int = 0,
) -> CrossFit:
    """Fit one probe on the training part of every split; ``"cv"`` chooses C within each training part."""
    own = None if groups is None else codes(groups)
    fits = []
    for train, _ in splits:
        inner = None if own is None else own[train]
        strength = choose_c(x[train], positive[train], inner, seed) if C == "cv" else C
        fits.append(fit_direction(x[train], positive[train], strength)[:2])
    return CrossFit(splits, [w for w, _ in fits], [b for _, b in fits])


def evaluate(
    features: Mapping[int, np.ndarray],
    labels: Sequence[Any] | np.ndarray,
    *,
    groups: Groups = None,
    categories: Sequence[str] | None = None,
    transfer: Mapping[int, np.ndarray] | None = None,
    C: float | Literal["cv"] = C_DEFAULT,
    seed: int = 0,
) -> dict[int, dict[str, Estimate]]:
    """Held-out quality of a probe at every layer.

    Args:
        features: layer -> (n, d_model).
        groups: prompts of one pair or template; never split, and resampled together.
        categories: kinds of harm (or of task), one a prompt: each is held out in turn.
        transfer: the other model's features of the *same* prompts, read with this model's held-out probes.
        C: ``"cv"`` chooses it within every training part (nested), by folds that keep groups whole.

    Returns:
        layer -> ``auroc``, ``accuracy`` (at logit 0), ``tpr_at_1fpr``, ``calibration_error`` and ``brier``,
        ``shuffled_auroc`` (mean of value and interval over probes of shuffled labels: what one such probe shows),
        ``random_auroc`` (mean and 2.5-97.5 % range over random directions whose sign was learned), ``means_auroc``
        and ``means_cosine`` (difference of means: its AUROC and its cosine to the exact direction, raw space),
        ``category_auroc`` and ``category_worst`` (mean over held-out categories, and the lowest),
        ``transfer_auroc``.
    """
    positive = is_harmful(labels)
    splits = folds(positive, groups, FOLDS, seed)
    rng = np.random.default_rng(seed)
    shuffles = np.stack([permute_within(positive, splits, rng) for _ in range(SHUFFLES)])
    result = {}
    for layer in sorted(features):
        x = checked(features[layer], positive, layer)
        probe = cross_fit(x, positive, splits, C, groups, seed)
        scores = probe.scores(x)
        right = np.where(np.isnan(scores), np.nan, (scores > 0) == positive)
        strength = choose_c(x, positive, groups, seed) if C == "cv" else C
        mixed = score_sweep(x, shuffles, splits, (strength,))[0]
        row = {
            "auroc": auroc(scores, positive, groups, seed=seed),
            "accuracy": rate(right) if groups is None else mean(right, groups=groups, seed=seed),
            "tpr_at_1fpr": tpr_at_fpr(scores, positive, 0.01, groups, seed=seed),
            **calibration(scores, positive, groups=groups, seed=seed),
            "shuffled_auroc": average(
                [auroc(s, own, groups, seed=seed) for s, own in zip(mixed, shuffles, strict=True)]
            ),
            "random_auroc": random_directions(x, positive, splits, seed),
            **difference_of_means(x, positive, splits, strength, groups=groups, seed=seed),
        }
        if categories is not None:
            row |= held_out_categories(x, positive, categories, strength, groups=groups, seed=seed)
        if transfer is not None:
            other = checked(transfer[layer], positive, layer)
            row["transfer_auroc"] = auroc(probe.scores(other), positive, groups, seed=seed)
        result[layer] = row
    return result


def transfer_back(
    features: Mapping[int, np.ndarray],
    other: Mapping[int, np.ndarray],
    labels: Sequence[Any] | np.ndarray,
    *,
    groups: Groups = None,
    C: float | Literal["cv"] = C_DEFAULT,
    seed: int = 0,
) -> dict[int, Estimate]:
    """AUROC of probes trained on ``other``'s features and read on ``features`` of the same prompts, out of fold."""
    positive = is_harmful(labels)
    splits = folds(positive, groups, FOLDS, seed)
    return {
        layer: auroc(
            cross_fit(checked(other[layer], positive, layer), positive, splits, C, groups, seed).scores(x),
            positive, groups, seed=seed,
        )
        for layer, x in features.items()
    }  # fmt: skip


def permute_within(
    positive: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> np.ndarray:
    """Labels shuffled within every test part: each fold keeps its share of harmful ones, so folds can be shared.

    (Shuffled across folds, a fold rich in harmful test prompts would have a training part poor in them, and chance
    would lie below 0.5.)
    """
    mixed = positive.copy()
    for _, test in splits:
        mixed[test] = rng.permutation(positive[test])
    return mixed


def calibration(
    scores: np.ndarray, positive: np.ndarray, *, groups: Groups = None, seed: int = 0
) -> dict[str, Estimate]:
    """``calibration_error``: mean distance of predicted and true share of harmful prompts over ten equally filled bins
    of the predicted probability; ``brier``: mean squared error of the probability. Both of out-of-fold logits.
    """
    read = ~np.isnan(scores)
    chance = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    own = None if groups is None else codes(groups)
    brier = mean(np.where(read, (chance - positive) ** 2, np.nan), groups=own, seed=seed)
    error, n, missing = (chance - positive)[read], int(read.sum()), int((~read).sum())
    if n < BINS:
        return {"calibration_error": Estimate(np.nan, NO_INTERVAL, n, missing), "brier": brier}
    rank = np.argsort(np.argsort(chance[read], kind="stable"), kind="stable")
    bins = np.eye(BINS)[rank * BINS // n]

    def statistic(weights: Weights) -> np.ndarray:
        return np.asarray(np.abs((weights * error) @ bins).sum(1) / weights.sum(1))

    ci = bootstrap(statistic, n, groups=None if own is None else own[read], seed=seed)
    value = float(statistic(np.ones((1, n)))[0])
    return {"calibration_error": Estimate(value, ci, n, missing), "brier": brier}


def difference_of_means(
    x: np.ndarray,
    positive: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    C: float,
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The cheap baseline: held-out AUROC of mean(harmful) - mean(others), and its cosine to the logistic direction."""
    scores = np.full(len(x), np.nan)
    for train, test in splits:
        y = positive[train]
        scores[test] = x[test] @ (x[train][y].mean(0) - x[train][~y].mean(0))
    exact, _, _ = fit_direction(x, positive, C)

    def cosine(weights: Weights) -> np.ndarray:
        up, down = weights[:, positive], weights[:, ~positive]
        with np.errstate(invalid="ignore", divide="ignore"):  # the last group of a class may be the one left out
            m = (up @ x[positive]) / up.sum(1, keepdims=True) - (down @ x[~positive]) / down.sum(1, keepdims=True)
        lengths = np.linalg.norm(m, axis=1) * np.linalg.norm(exact)
        return np.divide(m @ exact, lengths, out=np.full(len(m), np.nan), where=lengths > 0)

    value = float(cosine(np.ones((1, len(x))))[0])
    half = Z95 * jackknife(cosine, len(x), groups=None if groups is None else codes(groups))
    ci = NO_INTERVAL if np.isnan(half) else (max(-1.0, value - half), min(1.0, value + half))
    return {
        "means_auroc": auroc(scores, positive, groups, seed=seed),
        "means_cosine": Estimate(value, ci, len(x)),
    }


def held_out_categories(
    x: np.ndarray,
    positive: np.ndarray,
    categories: Sequence[str],
    C: float,
    *,
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """AUROC on each kind of harm of a probe that never saw it; empty where there are fewer than two kinds.

    A category without harmless prompts of its own is read against a share of those that belong to no kind of harm,
    held out with it. Prompts that share a group with a test prompt leave the training part.
    """
    kinds = np.asarray(categories).astype(str)
    names = [name for name in np.unique(kinds[positive]) if (positive & (kinds == name)).sum() >= FEWEST]
    if len(names) < 2:
        return {}
    own = np.arange(len(x)) if groups is None else codes(groups)
    free = np.flatnonzero(~positive & ~np.isin(kinds, names))
    units = np.unique(own[free])
    part = dict(zip(units, np.random.default_rng(seed).permutation(len(units)) % len(names), strict=True))
    share = np.full(len(x), -1)
    share[free] = [part[group] for group in own[free]]
    found = []
    for i, name in enumerate(names):
        test = (kinds == name) | (share == i)
        train = ~np.isin(own, own[test])
        if min(positive[train].sum(), (~positive[train]).sum(), (~positive[test]).sum()) < FEWEST:
            continue
        w, b, _ = fit_direction(x[train], positive[train], C)
        found.append(auroc(x[test] @ w + b, positive[test], own[test], seed=seed))
    if len(found) < 2:
        return {}
    return {"category_auroc": average(found), "category_worst": min(found, key=lambda item: item.value)}


def random_directions(
    x: np.ndarray, positive: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]], seed: int
) -> Estimate:
    """AUROC of random directions in standardised space, their sign learned on the training folds.

    ``n`` is the number of directions and the interval the middle 95 % of their AUROCs: where a probe must lie
    above to have found more than any direction has.
    """
    if not splits:
        return Estimate(np.nan, NO_INTERVAL, 0, RANDOM_DIRECTIONS)
    spread = x.std(0)
    z = np.divide(x - x.mean(0), spread, out=np.zeros_like(x), where=spread > 0)
    projected = z @ np.random.default_rng(seed).standard_normal((x.shape[1], RANDOM_DIRECTIONS))
    signed = np.full_like(projected, np.nan)
    for train, test in splits:
        y = positive[train]
        sign = np.sign(projected[train][y].mean(0) - projected[train][~y].mean(0))
        signed[test] = projected[test] * sign
    read = ~np.isnan(signed[:, 0])
    found = np.array([auroc_value(column[read], positive[read]) for column in signed.T])
    low, high = np.percentile(found, (2.5, 97.5))
    return Estimate(float(found.mean()), (float(low), float(high)), len(found))


def text_baselines(
    texts: Sequence[str],
    labels: Sequence[Any] | np.ndarray,
    *,
    lengths: Sequence[int],
    groups: Groups = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Held-out AUROC without any activation: ``length_auroc`` from the texts' characters, ``tokens_auroc`` from
    ``lengths`` (tokens of the rendered prompt), ``words_auroc`` from a bag of words. A probe that does not beat them
    may be reading no more than they do.
    """
    positive = is_harmful(labels)
    splits = folds(positive, groups, FOLDS, seed)

    def by_size(sizes: Sequence[int]) -> Estimate:
        x = np.log1p(np.asarray(sizes, np.float64))[:, None]
        return auroc(cross_fit(x, positive, splits).scores(x), positive, groups, seed=seed)

    return {
        "length_auroc": by_size([len(text) for text in texts]),
        "tokens_auroc": by_size(lengths),
        "words_auroc": auroc(_word_scores(texts, positive, splits), positive, groups, seed=seed),
    }


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of value and of interval over repetitions of one measurement (not the interval of their mean)."""
    known = [item for item in estimates if not np.isnan(item.value)]
    if not known:
        return Estimate(np.nan, NO_INTERVAL, 0, sum(item.n + item.n_missing for item in estimates))
    bounds = np.mean([item.ci for item in known], axis=0)
    value = float(np.mean([item.value for item in known]))
    return Estimate(value, (float(bounds[0]), float(bounds[1])), known[0].n, known[0].n_missing)


def _word_scores(texts: Sequence[str], positive: np.ndarray, splits) -> np.ndarray:
    scores = np.full(len(texts), np.nan)
    for train, test in splits:
        # One-letter words count: "I" and "a" tell requests apart as well as others do.
        words = CountVectorizer(token_pattern=r"(?u)\b\w+\b", binary=True)
        seen = words.fit_transform([texts[i] for i in train])
        model = LogisticRegression(max_iter=1000).fit(seen, positive[train])
        scores[test] = model.decision_function(words.transform([texts[i] for i in test]))
    return scores
