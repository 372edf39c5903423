"""Sentences follow the numbers: a cost below zero is a gain, a rate above the prefix is above it."""

from __future__ import annotations

from typing import Any

import pytest

from pingscope.experiments.studies.claims import cost_in_words, make_claims


def cell(value: float) -> dict[str, Any]:
    return {"value": value, "ci": [max(0.0, value - 0.05), min(1.0, value + 0.05)], "n": 100, "n_missing": 0}


def arm(refused: float, done: float) -> dict[str, Any]:
    return {
        "harmful": {"strict": {"refusal_rate": cell(refused)}},
        "benign": {"strict": {"success_rate": cell(done), "refusal_rate": cell(0.0)}},
    }


def claims(**arms: dict[str, Any]) -> dict[str, dict[str, Any]]:
    behaviour = {name.replace("__", "+").replace("_", "-"): rates for name, rates in arms.items()}
    return {claim["id"]: claim for claim in make_claims({"behaviour": behaviour})}


@pytest.mark.parametrize(
    ("points", "words"),
    [(3.2, "costs 3 points"), (1.0, "costs 1 point"), (-3.0, "gains 3 points"), (-0.6, "gains 1 point"),
     (0.3, "costs no point"), (-0.4, "costs no point")],
)  # fmt: skip
def test_costs_in_words(points: float, words: str) -> None:
    assert cost_in_words(points) == words


def test_a_negative_cost_is_a_gain_and_the_claim_holds_by_its_rule() -> None:
    better = claims(agent=arm(0.02, 0.88), agent__prefix=arm(0.98, 0.91))["prefix-restores"]
    assert "gains 3 points of benign success (91%" in better["text"] and better["holds"] is True
    worse = claims(agent=arm(0.02, 0.93), agent__prefix=arm(0.98, 0.85))["prefix-restores"]
    assert "costs 8 points of benign success" in worse["text"] and worse["holds"] is False


def test_a_control_that_beats_the_prefix_is_said_to_lie_above_it() -> None:
    found = claims(agent=arm(0.0, 0.9), agent__prefix=arm(0.9, 0.9), agent__shuffled_prefix=arm(0.95, 0.9))
    assert "5 points above the prefix" in found["shuffled-prefix"]["text"]
    assert found["shuffled-prefix"]["holds"] is False
    level = claims(agent=arm(0.0, 0.9), agent__prefix=arm(0.9, 0.9), agent__suffix=arm(0.9, 0.9))["suffix"]
    assert "level with the prefix" in level["text"] and level["holds"] is False


def test_steering_that_costs_nothing_says_so() -> None:
    results = {
        "behaviour": {"agent": arm(0.02, 0.86)},
        "steering": {"add": {"1-3": {"0.2": arm(0.94, 0.90)}}},
        "steering_chosen": {"layers": "1-3", "dose": "0.2"},
    }
    (claim,) = (claim for claim in make_claims(results) if claim["id"] == "steering-restores")
    assert "gains 4 points of benign success" in claim["text"] and claim["holds"] is True
