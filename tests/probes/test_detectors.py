"""Detectors: each finds what it is made for, thresholds keep their promise, chains agree with brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from pingscope.interp.errors import UserError
from pingscope.probes.coherence import Coherence
from pingscope.probes.detectors import DETECTORS, Prompts, best_layer, compare_detectors, threshold
from pingscope.probes.multiplicity import false_discovery, p_beyond, permuted_gaps
from pingscope.probes.statistics import Estimate
from pingscope.probes.trajectory import Markov, Packed, Trajectory


def prompts(n, seed, signal=2.0, order=False):
    """Harmful prompts lie along the first axis; with ``order`` only the order of their halves is harmful."""
    rng = np.random.default_rng(seed)
    states, labels = [], []
    for i in range(n):
        label = ("harmful", "benign")[i % 2]
        x = rng.standard_normal((int(rng.integers(20, 40)), 6))
        half = len(x) // 2
        if order:
            x[:half, 0] += 4 if label == "harmful" else -4
            x[half:, 0] -= 4 if label == "harmful" else -4
        elif label == "harmful":
            x[:, 0] += signal
        states.append(x)
        labels.append(label)
    return Prompts(states, [f"task {i % 7}" for i in range(n)], labels)


def deepened(one, other):
    """Two layers side by side."""
    deep = [np.concatenate([a, b[: len(a)]], 1) for a, b in zip(one.states, other.states, strict=True)]
    return replace(one, states=[a[: len(b)] for a, b in zip(one.states, deep, strict=True)], deep=deep)


@pytest.fixture(scope="module")
def compared():
    """The first of the two layers has the signal, the second (the same lengths, other noise) has none."""
    made = [prompts(n, seed) for n, seed in ((60, 0), (60, 1), (80, 2))]
    noise = [
        replace(one, states=[np.random.default_rng(i).standard_normal(x.shape) for i, x in enumerate(one.states)])
        for one in made
    ]
    return compare_detectors(*(deepened(one, other) for one, other in zip(made, noise, strict=True)))


def test_every_detector_finds_a_strong_signal_and_the_words_nothing(compared):
    assert set(compared) == set(DETECTORS)
    for name, cell in compared.items():
        if name == "words":
            assert abs(cell["auroc"].value - 0.5) < 0.2
        else:
            assert cell["auroc"].value > 0.85, name
        assert cell["fpr"].value <= 0.2 and cell["tpr"].n == cell["fpr"].n == 40
        assert cell["lookalike_fpr"].n == 0


def test_only_the_trajectory_sees_an_order():
    train, test = prompts(40, 3, order=True), prompts(40, 4, order=True)
    area = {}
    for name in ("mean", "trajectory", "trajectory, shuffled tokens"):
        z = DETECTORS[name](train, 0)(test)
        area[name] = float((z[test.harmful][:, None] > z[~test.harmful]).mean())
    assert area["trajectory"] > 0.95
    assert max(abs(area[name] - 0.5) for name in ("mean", "trajectory, shuffled tokens")) < 0.3


def test_several_layers_catch_what_one_of_them_holds():
    blind, seeing = [prompts(60, seed, 0.0) for seed in (10, 11)], [prompts(60, seed, 2.0) for seed in (10, 11)]
    train, test = (deepened(one, other) for one, other in zip(blind, seeing, strict=True))
    area = {}
    for name in ("coherence", "coherence, several layers"):
        z = DETECTORS[name](train, 0)(test)
        area[name] = float((z[test.harmful][:, None] > z[~test.harmful]).mean())
    assert abs(area["coherence"] - 0.5) < 0.2 and area["coherence, several layers"] > 0.9
    assert "coherence, several layers" not in compare_detectors(*[prompts(30, seed) for seed in range(3)])


def test_the_threshold_lets_through_no_more_than_promised():
    scores = np.random.default_rng(0).permutation(np.arange(200.0))
    assert (scores > threshold(scores, 0.01)).sum() == 2
    assert (scores[:50] > threshold(scores[:50], 0.01)).sum() == 0


def test_likelihood_is_the_sum_over_all_paths():
    rng = np.random.default_rng(0)
    start, step = np.log(rng.dirichlet([1, 1])), np.log(rng.dirichlet([1, 1], 2))
    model = Markov(start, step, rng.standard_normal((2, 3)), rng.uniform(0.5, 2, (2, 3)))
    sequences = [rng.standard_normal((length, 3)) for length in (4, 1, 3)]
    packed = Packed.of(sequences)
    density = model.emissions(packed)
    gamma, _, total = model.expect(packed)
    for i, x in enumerate(sequences):
        paths = [
            start[path[0]]
            + sum(step[a, b] for a, b in itertools.pairwise(path))
            + sum(density[i, t, s] for t, s in enumerate(path))
            for path in itertools.product(range(2), repeat=len(x))
        ]
        assert total[i] == pytest.approx(np.logaddexp.reduce(paths))
        assert model.likelihood(packed)[i] == pytest.approx(total[i])
        assert gamma[i, : len(x)].sum(1) == pytest.approx(1.0)


def test_coherence_is_read_on_the_smoothed_course():
    probe = Coherence(np.array([1.0, 0.0]), 0.0)
    spike, stretch = np.zeros((40, 2)), np.zeros((40, 2))
    spike[20, 0] = 5.0
    stretch[20:, 0] = 1.0
    assert probe.score(stretch) > probe.score(spike) > 0


def test_a_trajectory_does_not_depend_on_the_batch():
    data = prompts(30, 5)
    model = Trajectory.fit(data.states, data.harmful)
    alone = [float(model.scores([x])[0]) for x in data.states[:4]]
    assert model.scores(data.states)[:4] == pytest.approx(alone)


def test_the_layer_comes_from_selection_prompts():
    layers = {0: 0.0, 1: 3.0, 2: 0.5}
    train = {layer: prompts(40, 6, signal) for layer, signal in layers.items()}
    selection = {layer: prompts(40, 7, signal) for layer, signal in layers.items()}
    assert best_layer(train, selection) == 1


def test_one_class_is_refused():
    one = prompts(20, 0).take(np.arange(0, 20, 2))
    with pytest.raises(UserError, match="need harmful and benign"):
        compare_detectors(one, prompts(20, 1), prompts(20, 2))


def test_false_discovery_by_hand():
    p = [0.01, 0.04, 0.03, np.nan, 0.5]
    assert false_discovery(p) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, np.nan, 0.5], nan_ok=True)


def test_among_nulls_almost_nothing_is_found():
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal((60, 200)), np.arange(60) % 2 == 0
    p, low, high = permuted_gaps(values, labels, permutations=400)
    assert (false_discovery(p) <= 0.05).sum() <= 2
    assert 0.85 < ((p > 0.05).mean()) <= 1 and (low < 0).all() and (high > 0).all()
    values[labels, 3] += 3
    assert false_discovery(permuted_gaps(values, labels, permutations=400)[0])[3] <= 0.5
    assert permuted_gaps(values, labels, permutations=400)[0][3] == pytest.approx(1 / 401)


def test_p_beyond_agrees_with_the_interval():
    found = Estimate(2.0, (1.0, 3.0), 50)
    assert p_beyond(found, 1.0, 1) == pytest.approx(0.025)
    assert p_beyond(found, 3.0, -1) == pytest.approx(0.025)
    assert p_beyond(found, 2.0, 1) == pytest.approx(0.5)
    assert np.isnan(p_beyond(Estimate(np.nan, (np.nan, np.nan), 0), 0.0, 1))
