"""Safety against usefulness: the front, the marks and the numbers."""

from __future__ import annotations

import sample

from pingscope.figures import pareto


def arm(refused: float, done: float, over: float = 0.0) -> dict:
    return {
        "harmful": {"strict": {"refusal_rate": sample.share(refused)}},
        "benign": {"strict": {"success_rate": sample.share(done)}},
        "lookalike": {"strict": {"refusal_rate": sample.share(over)}},
    }


def test_the_front_keeps_what_nothing_beats():
    points = {"a": (0.9, 0.1), "b": (0.9, 0.9), "c": (0.2, 1.0), "d": (0.2, 0.9), "e": (0.9, 0.9)}
    assert pareto.pareto_front(points) == ["c", "b", "e"]


def test_one_mark_an_arm_by_over_refusal():
    results = {
        "behaviour": {"agent": arm(0.0, 0.9), "agent+naive": arm(1.0, 0.0, 1.0), "agent+steer": arm(0.95, 0.9, 0.2)}
    }
    section = pareto.section(sample.typed(results))
    assert section is not None
    marks = {
        trace.customdata[0][0]: trace.marker.symbol
        for trace in section.panels[0].figure.data
        if trace.customdata is not None
    }
    assert marks == {"agent": "circle", "agent+naive": "diamond", "agent+steer": "circle-open"}
    assert [row[0] for row in section.tables[0].rows] == ["1  agent", "2  agent+naive *", "3  agent+steer *"]
    assert len(section.keys) == 3


def test_arms_without_both_numbers_are_left_out_and_two_are_no_figure():
    cell = arm(0.5, 0.5)
    half = {"harmful": cell["harmful"]}
    assert pareto.section(sample.typed({"behaviour": {"a": cell, "b": cell, "c": half}})) is None
    assert pareto.section(sample.typed({})) is None


def test_the_chosen_steering_is_an_arm():
    results = {
        "behaviour": {"agent": arm(0.0, 0.9), "agent+prefix": arm(0.9, 0.9)},
        "steering": {"add": {"0-3": {"0.2": arm(0.95, 0.9), "0.4": arm(1.0, 0.1)}}},
        "steering_chosen": {"layers": "0-3", "dose": "0.2"},
    }
    section = pareto.section(sample.typed(results))
    assert section is not None and [row[0] for row in section.tables[0].rows][-1] == "3  agent+steer *"
