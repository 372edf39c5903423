"""Successive halving: the winner of the full sweep for a quarter of its cost, tasks nested, ties to the cheaper."""

from __future__ import annotations

import numpy as np
import pytest

from pingscope.experiments.studies.steering.halving import halve


def noisy(seed: int, n: int = 40):
    """25 settings with different success rates on the same tasks, the best at 0.97, most far below."""
    rng = np.random.default_rng(seed)
    rates = np.concatenate([[0.97, 0.8, 0.7], rng.uniform(0, 0.6, 22)])
    draws = rng.uniform(size=(n, 1)) * 0.4 + rng.uniform(size=(n, 25)) * 0.6 < rates
    order = rng.permutation(25)
    return [int(i) for i in order], lambda setting, size: float(draws[:size, setting].mean())


@pytest.mark.parametrize("seed", range(6))
def test_the_winner_is_that_of_the_full_sweep_for_a_quarter(seed):
    settings, value = noisy(seed)
    fast, full = (halve(settings, value, 40, exhaustive=exhaustive) for exhaustive in (False, True))
    assert fast.winner == full.winner and fast.value == full.value
    assert full.spent == full.full == fast.full == 1000
    assert fast.spent <= 0.25 * fast.full


def test_every_round_goes_on_with_the_best_on_more_tasks():
    settings, value = noisy(0)
    asked: dict[int, list[int]] = {}

    def spy(setting, size):
        asked.setdefault(setting, []).append(size)
        return value(setting, size)

    found = halve(settings, spy, 40)
    assert [one["n"] for one in found.rounds] == [4, 12, 40]
    assert [len(one["values"]) for one in found.rounds] == [25, 8, 3]
    assert all(sizes == [4, 12, 40][: len(sizes)] for sizes in asked.values())
    assert max(value for _, value in found.rounds[-1]["values"]) == found.value


def test_ties_go_to_the_cheaper_setting_then_to_the_earlier():
    assert (
        halve(["dear", "cheap", "cheap too"], lambda s, n: 1.0, 8, cost=lambda s: float(s == "dear")).winner == "cheap"
    )


def test_one_setting_and_few_tasks():
    assert halve(["only"], lambda s, n: 0.5, 3).to_dict(str)["rounds"] == [{"n": 3, "values": {"only": 0.5}}]
