"""A trajectory model: does the *course* of the activations over a prompt tell harmful from benign?

Tokens are projected on a few principal components; one Gaussian hidden Markov model is fitted to the harmful and one to
the benign prompts, and a prompt's score is the difference of their log-likelihoods per token (arXiv 2605.12726, the
recipe as reconstructed: diagonal covariances, a variance floor, several starts). With the tokens of every prompt
shuffled the order is gone: if that scores as well, the chain adds nothing to a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

COMPONENTS = 16
STATES = 4
STARTS = 3
STEPS = 25
FLOOR = 1e-2  # of the data's variance
_PSEUDO = 1.0  # count added to every transition and start

Sequences = Sequence[np.ndarray]  # (token, d_model) each, of different lengths


@dataclass(frozen=True)
class Markov:
    """A hidden Markov chain with diagonal Gaussian states; probabilities as logarithms."""

    start: Float[np.ndarray, " state"]
    step: Float[np.ndarray, "state state"]
    means: Float[np.ndarray, "state d"]
    variances: Float[np.ndarray, "state d"]

    def emissions(self, packed: Packed) -> np.ndarray:
        """Log densities (prompt, token, state); 0 beyond a prompt's end."""
        off = packed.x[:, :, None, :] - self.means
        density = -0.5 * (off**2 / self.variances + np.log(2 * np.pi * self.variances)).sum(-1)
        return density * packed.there[:, :, None]

    def likelihood(self, packed: Packed) -> Float[np.ndarray, " prompt"]:
        """Log-likelihood of every prompt's tokens."""
        return _logsum(self._forward(packed, self.emissions(packed))[:, -1])

    def _forward(self, packed: Packed, density: np.ndarray) -> np.ndarray:
        alpha = np.empty_like(density)
        alpha[:, 0] = self.start + density[:, 0]
        for t in range(1, density.shape[1]):
            moved = _logsum(alpha[:, t - 1, :, None] + self.step, 1) + density[:, t]
            alpha[:, t] = np.where(packed.there[:, t, None], moved, alpha[:, t - 1])
        return alpha

    def expect(self, packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State probabilities (prompt, token, state), expected transitions (state, state), log-likelihoods."""
        density = self.emissions(packed)
        alpha, beta = self._forward(packed, density), np.zeros_like(density)
        for t in range(density.shape[1] - 2, -1, -1):
            moved = _logsum(self.step + (density[:, t + 1] + beta[:, t + 1])[:, None, :], 2)
            beta[:, t] = np.where(packed.there[:, t + 1, None], moved, 0.0)
        total = _logsum(alpha[:, -1])
        joint = alpha[:, :-1, :, None] + self.step + (density + beta)[:, 1:, None, :] - total[:, None, None, None]
        pairs = (np.exp(joint) * packed.there[:, 1:, None, None]).sum((0, 1))
        return np.exp(alpha + beta - total[:, None, None]) * packed.there[:, :, None], pairs, total


@dataclass(frozen=True)
class Packed:
    """Prompts of different lengths side by side; ``there`` marks true tokens, each prompt's first."""

    x: Float[np.ndarray, "prompt token d"]
    there: Bool[np.ndarray, "prompt token"]

    @classmethod
    def of(cls, sequences: Sequences) -> Packed:
        longest = max(map(len, sequences))
        x = np.zeros((len(sequences), longest, sequences[0].shape[1]))
        there = np.zeros((len(sequences), longest), bool)
        for i, sequence in enumerate(sequences):
            x[i, : len(sequence)], there[i, : len(sequence)] = sequence, True
        return cls(x, there)


def fit_markov(sequences: Sequences, states: int = STATES, seed: int = 0) -> Markov:
    """Expectation maximisation from :data:`STARTS` random starts; the likeliest result."""
    packed, tokens = Packed.of(sequences), np.concatenate(sequences)
    floor = FLOOR * tokens.var(0) + 1e-12
    best: tuple[float, Markov] | None = None
    for start in range(STARTS):
        rng = np.random.default_rng(seed + start)
        means = tokens[rng.choice(len(tokens), states, replace=len(tokens) < states)]
        model = Markov(
            np.full(states, -np.log(states)),
            np.log(np.full((states, states), 0.5 / states) + 0.5 * np.eye(states)),
            means,
            np.tile(tokens.var(0) + floor, (states, 1)),
        )
        before = -np.inf
        for _ in range(STEPS):
            model, likelihood = _improve(model, packed, floor)
            if likelihood - before < 1e-4 * len(tokens):
                break
            before = likelihood
        if best is None or likelihood > best[0]:
            best = (likelihood, model)
    assert best is not None
    return best[1]


def _improve(model: Markov, packed: Packed, floor: np.ndarray) -> tuple[Markov, float]:
    """One step of expectation maximisation, and the likelihood before it."""
    gamma, pairs, total = model.expect(packed)
    weights, tokens = gamma[packed.there], packed.x[packed.there]
    mass = weights.sum(0) + 1e-9
    means = (weights.T @ tokens) / mass[:, None]
    variances = np.maximum((weights.T @ tokens**2) / mass[:, None] - means**2, floor)
    pairs, starts = pairs + _PSEUDO, gamma[:, 0].sum(0) + _PSEUDO
    better = Markov(np.log(starts / starts.sum()), np.log(pairs / pairs.sum(1, keepdims=True)), means, variances)
    return better, float(total.sum())


def _logsum(x: np.ndarray, axis: int = -1) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis))


@dataclass(frozen=True)
class Trajectory:
    """Two chains in the space of the leading principal components."""

    centre: Float[np.ndarray, " d_model"]
    axes: Float[np.ndarray, "d_model d"]
    harmful: Markov
    benign: Markov

    @classmethod
    def fit(cls, sequences: Sequences, positive: np.ndarray, seed: int = 0) -> Trajectory:
        """Principal components of the tokens, every prompt with the same weight, then a chain for each class."""
        sequences = [np.asarray(x, np.float64) for x in sequences]
        centre = np.mean([x.mean(0) for x in sequences], axis=0)
        spread = sum((x - centre).T @ (x - centre) / len(x) for x in sequences)
        values, vectors = np.linalg.eigh(spread)
        axes = vectors[:, ::-1][:, :COMPONENTS] / np.sqrt(np.maximum(values[::-1][:COMPONENTS] / len(sequences), 1e-12))
        projected = [(x - centre) @ axes for x in sequences]
        chains = [
            fit_markov([x for x, own in zip(projected, positive, strict=True) if own == side], seed=seed)
            for side in (True, False)
        ]
        return cls(centre, axes, *chains)

    def scores(self, sequences: Sequences) -> Float[np.ndarray, " prompt"]:
        """Log-likelihood ratio per token of every prompt, positive = harmful."""
        packed = Packed.of([(x - self.centre) @ self.axes for x in sequences])
        return (self.harmful.likelihood(packed) - self.benign.likelihood(packed)) / packed.there.sum(1)
