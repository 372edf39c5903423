"""Detectors of harmful prompts at a fixed false-positive rate, side by side on prompts they never saw.

Every detector is trained on the training prompts, takes its threshold from benign *selection* prompts (at most 1 % of
them may lie above) and is read on test prompts: what it catches there, and what it really lets through. AUROCs of such
detectors are all alike and their catch at 1 % is not. The words alone are the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from pingscope.interp.errors import UserError
from pingscope.probes.coherence import Coherence
from pingscope.probes.logistic import C_DEFAULT, fit_direction
from pingscope.probes.resampling import Groups
from pingscope.probes.statistics import Estimate, auroc, rate, tpr_at_fpr
from pingscope.probes.trajectory import Trajectory

FPR = 0.01

Scores = Callable[["Prompts"], np.ndarray]  # (prompt,), larger = more harmful


@dataclass(frozen=True)
class Prompts:
    """Token activations of one layer, from the first that can tell to the final one, and the text, of labelled prompts.

    ``deep`` are those of several layers side by side, for the detector that reads them; empty: it is left out.
    """

    states: Sequence[np.ndarray]  # (token, d_model) each
    texts: Sequence[str]
    labels: Sequence[str]
    groups: Groups = None
    deep: Sequence[np.ndarray] = ()  # (token, layers x d_model) each

    @property
    def harmful(self) -> np.ndarray:
        return np.array([label == "harmful" for label in self.labels])

    def take(self, rows: np.ndarray) -> Prompts:
        picked = (np.flatnonzero(rows) if rows.dtype == bool else rows).tolist()
        groups = None if self.groups is None else [self.groups[i] for i in picked]
        return Prompts(
            [self.states[i] for i in picked],
            [self.texts[i] for i in picked],
            [self.labels[i] for i in picked],
            groups,
            [self.deep[i] for i in picked] if self.deep else (),
        )


def final_token(train: Prompts, seed: int) -> Scores:
    """A probe trained and read at the final token."""
    w, b, _ = fit_direction(_final(train), train.harmful, C_DEFAULT)
    return lambda prompts: _final(prompts) @ w + b


def prompt_mean(train: Prompts, seed: int) -> Scores:
    """A probe trained and read on the mean of the prompt."""
    w, b = _mean_probe(train)
    return lambda prompts: _mean(prompts) @ w + b


def largest_token(train: Prompts, seed: int) -> Scores:
    """The probe of the mean, read at every token; the largest logit counts."""
    w, b = _mean_probe(train)
    return lambda prompts: np.array([float((x @ w + b).max()) for x in prompts.states])


def coherence(train: Prompts, seed: int) -> Scores:
    """:mod:`pingscope.probes.coherence`."""
    fitted = Coherence.fit(train.states, train.harmful, _mean_probe(train))
    return lambda prompts: np.array([fitted.score(x) for x in prompts.states])


def deep_coherence(train: Prompts, seed: int) -> Scores:
    """The same on several layers side by side, as published."""
    fitted = Coherence.fit(train.deep, train.harmful, _mean_probe(replace(train, states=train.deep)))
    return lambda prompts: np.array([fitted.score(x) for x in prompts.deep])


def trajectory(train: Prompts, seed: int) -> Scores:
    """:mod:`pingscope.probes.trajectory`."""
    fitted = Trajectory.fit(train.states, train.harmful, seed)
    return lambda prompts: fitted.scores(prompts.states)


def shuffled_trajectory(train: Prompts, seed: int) -> Scores:
    """The same with the tokens of every prompt in random order: what is left without their course."""
    rng = np.random.default_rng(seed)

    def mixed(prompts: Prompts) -> list[np.ndarray]:
        return [x[rng.permutation(len(x))] for x in prompts.states]

    fitted = Trajectory.fit(mixed(train), train.harmful, seed)
    return lambda prompts: fitted.scores(mixed(prompts))


def words(train: Prompts, seed: int) -> Scores:
    """A bag of words: no activation at all."""
    counter = CountVectorizer(token_pattern=r"(?u)\b\w+\b", binary=True)
    model = LogisticRegression(max_iter=1000).fit(counter.fit_transform(train.texts), train.harmful)
    return lambda prompts: np.asarray(model.decision_function(counter.transform(prompts.texts)))


DETECTORS: Mapping[str, Callable[[Prompts, int], Scores]] = {
    "final": final_token,
    "mean": prompt_mean,
    "max": largest_token,
    "coherence": coherence,
    "coherence, several layers": deep_coherence,
    "trajectory": trajectory,
    "trajectory, shuffled tokens": shuffled_trajectory,
    "words": words,
}


def compare_detectors(
    train: Prompts, selection: Prompts, test: Prompts, *, fpr: float = FPR, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Per detector: ``auroc``, ``tpr`` and ``fpr`` at the threshold from selection prompts, ``lookalike_fpr``, and
    ``tpr_at_1fpr`` with a threshold from the test prompts themselves.

    Raises:
        UserError: no benign selection prompt, or one class only in training.
    """
    if train.harmful.all() or not train.harmful.any() or not (np.asarray(selection.labels) == "benign").any():
        raise UserError("detectors: need harmful and benign training prompts, and benign ones for the threshold")
    found: dict[str, dict[str, Any]] = {}
    kinds = np.asarray(test.labels)
    contrasted = kinds != "lookalike"
    for name, fit in DETECTORS.items():
        if fit is deep_coherence and not train.deep:
            continue
        score = fit(train, seed)
        limit = threshold(score(selection)[np.asarray(selection.labels) == "benign"], fpr)
        z = score(test)
        groups = None if test.groups is None else np.asarray(test.groups)[contrasted]
        harmful = (kinds == "harmful")[contrasted]
        found[name] = {
            "auroc": auroc(z[contrasted], harmful, groups, seed=seed),
            "tpr": rate(z[kinds == "harmful"] > limit),
            "fpr": rate(z[kinds == "benign"] > limit),
            "lookalike_fpr": rate(z[kinds == "lookalike"] > limit),
            "tpr_at_1fpr": tpr_at_fpr(z[contrasted], harmful, fpr, groups, seed=seed),
        }
    return found


def threshold(benign: np.ndarray, fpr: float = FPR) -> float:
    """The smallest of the benign scores that at most a share ``fpr`` of them exceed; with few, the largest."""
    ranked = np.sort(benign)[::-1]
    return float(ranked[int(np.floor(fpr * len(ranked) + 1e-9))])


def best_layer(train: Mapping[int, Prompts], selection: Mapping[int, Prompts]) -> int:
    """The layer whose mean probe tells selection prompts apart best; the lowest on a tie."""

    def quality(layer: int) -> Estimate:
        return auroc(prompt_mean(train[layer], 0)(selection[layer]), selection[layer].harmful)

    return max(sorted(train), key=lambda layer: (quality(layer).value, -layer))


def _final(prompts: Prompts) -> np.ndarray:
    return np.stack([x[-1] for x in prompts.states]).astype(np.float64)


def _mean(prompts: Prompts) -> np.ndarray:
    return np.stack([x.mean(0, dtype=np.float64) for x in prompts.states])


def _mean_probe(train: Prompts) -> tuple[np.ndarray, float]:
    w, b, _ = fit_direction(_mean(train), train.harmful, C_DEFAULT)
    return w, b
