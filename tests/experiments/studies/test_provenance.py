"""What a report says about the making of its models."""

from __future__ import annotations

from typing import Any

from pingscope.experiments.studies.provenance import aligned


def cell(value: float, n: int) -> dict[str, Any]:
    return {"value": value, "ci": [value / 2, min(1.0, 2 * value)], "n": n, "n_missing": 0}


def test_what_an_alignment_cost_is_said_with_its_intervals() -> None:
    ratio = {"value": 1.33, "ci": [0.98, 1.4], "n": 12, "n_missing": 0}
    before = {"refused": {"harmful": cell(0.0, 72), "benign": cell(0.0, 48)}}
    after = {"refused": {"harmful": cell(0.5, 72), "benign": cell(0.25, 48)}, "perplexity_ratio": ratio}
    text = aligned({"SmolLM2": before, "base": after})
    assert "before and after it 0% [0, 0], n = 72 and 50% [25, 100], n = 72" in text
    assert "everyday ones after it 25% [12, 50], n = 48" in text and "English +33% [-2, 40], n = 12" in text
