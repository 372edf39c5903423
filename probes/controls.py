"""Held-out evaluation of probes, with the controls that a reading needs beside it.

Everything is out of fold: each prompt is scored by a probe that saw neither it nor any prompt of its group.
The controls answer: would a probe trained on shuffled labels do as well, would a random direction, does the
probe carry over to the other model, and do the prompt's length or its bare words already tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from probes.logistic import C_DEFAULT, checked, fit_direction, folds, is_harmful
from probes.resampling import NO_INTERVAL, Groups
from probes.statistics import Estimate, auroc, auroc_value, rate, tpr_at_fpr

FOLDS = 5
SHUFFLES = 3
RANDOM_DIRECTIONS = 100


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
    C: float = C_DEFAULT,
) -> CrossFit:
    """Fit one probe on the training part of every split."""
    fits = [fit_direction(x[train], positive[train], C)[:2] for train, _ in splits]
    return CrossFit(splits, [w for w, _ in fits], [b for _, b in fits])


def evaluate(
    features: Mapping[int, np.ndarray],
    labels: Sequence[Any] | np.ndarray,
    *,
    groups: Groups = None,
    transfer: Mapping[int, np.ndarray] | None = None,
    C: float = C_DEFAULT,
    seed: int = 0,
) -> dict[int, dict[str, Estimate]]:
    """Held-out quality of a probe at every layer.

    Args:
        features: layer -> (n, d_model).
        groups: prompts of one pair or template; never split, and resampled together.
        transfer: the other model's features of the *same* prompts, read with this model's held-out probes.

    Returns:
        layer -> ``auroc``, ``accuracy`` (at logit 0), ``tpr_at_1fpr``, ``shuffled_auroc`` (mean of value and
        interval over probes of shuffled labels: what one such probe shows), ``random_auroc`` (mean and
        2.5-97.5 % range over random directions whose sign was learned), and ``transfer_auroc``.
    """
    positive = is_harmful(labels)
    splits = folds(positive, groups, FOLDS, seed)
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(positive) for _ in range(SHUFFLES)]
    shuffled_splits = [folds(labels_, groups, FOLDS, seed) for labels_ in shuffles]
    result = {}
    for layer in sorted(features):
        x = checked(features[layer], positive, layer)
        probe = cross_fit(x, positive, splits, C)
        scores = probe.scores(x)
        row = {
            "auroc": auroc(scores, positive, groups, seed=seed),
            "accuracy": rate(np.where(np.isnan(scores), np.nan, (scores > 0) == positive)),
            "tpr_at_1fpr": tpr_at_fpr(scores, positive, 0.01, groups, seed=seed),
            "shuffled_auroc": average(
                [
                    auroc(cross_fit(x, mixed, parts, C).scores(x), mixed, groups, seed=seed)
                    for mixed, parts in zip(shuffles, shuffled_splits, strict=True)
                ]
            ),
            "random_auroc": random_directions(x, positive, splits, seed),
        }
        if transfer is not None:
            other = checked(transfer[layer], positive, layer)
            row["transfer_auroc"] = auroc(probe.scores(other), positive, groups, seed=seed)
        result[layer] = row
    return result


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
    """Held-out AUROC without any activation: ``length_auroc`` from ``lengths`` (tokens), ``words_auroc`` from
    a bag of words. A probe that does not beat them may be reading no more than they do.
    """
    positive = is_harmful(labels)
    splits = folds(positive, groups, FOLDS, seed)
    sizes = np.log1p(np.asarray(lengths, np.float64))[:, None]
    return {
        "length_auroc": auroc(cross_fit(sizes, positive, splits).scores(sizes), positive, groups, seed=seed),
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
