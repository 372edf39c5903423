"""What single figures do with their numbers: alignment, bands, pairs, fronts."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import sample

from pingscope.figures import bounds, finetuning, injection, numbers, search, steering, tokens, tracks
from pingscope.figures.marks import band
from pingscope.schema import Estimate, check_tokens


def test_bands_break_where_the_interval_is_missing() -> None:
    fig = go.Figure()
    nan = np.nan
    x = np.arange(5, dtype=float)
    band(fig, x, np.array([0, 0, nan, 0, 0.0]), np.array([1, 1, 1, 1, nan]), "#000000")
    assert np.asarray(fig.data[0].x).tolist()[:4] == [0, 1, 1, 0]
    assert np.isnan(fig.data[0].x[4])
    assert np.asarray(fig.data[0].x).tolist()[5:] == [3, 3]


def test_roles_stand_at_the_same_place_in_every_arm() -> None:
    section = tracks.section(sample.typed(sample.results()))
    assert section is not None
    for by in ("fraction", "index"):
        panels = [panel for panel in section.panels if panel.view == {"by": by}]
        names = [panel.title for panel in panels]
        assert names == ["base", "agent", "agent+prefix", "Harmful minus benign"]
        edges = [[(s.x0, s.x1) for s in panel.figure.layout.shapes if s.type == "rect"] for panel in panels]
        assert all(edge == edges[0] for edge in edges)


def test_instructions_are_drawn_by_tenths_or_by_token() -> None:
    results = sample.results()

    def places(by: str) -> list[str]:
        section = tracks.section(sample.typed(results))
        assert section is not None
        panel = next(panel for panel in section.panels if panel.view == {"by": by} and panel.title == "agent")
        line = next(t for t in panel.figure.data if t.customdata is not None and t.meta == {"layer": "3"})
        return [detail[0] for detail in line.customdata if detail[0].startswith(("instruction", "page"))]

    assert places("fraction")[:11] == [*(f"instruction, tenth {i} of 10" for i in range(1, 11)), "page, tenth 1 of 10"]
    assert places("index")[15:18] == [*(f"instruction, token {i} of 17" for i in (16, 17)), "page, tenth 1 of 10"]
    for arm in results["curves"].values():
        for labels in arm.values():
            for cell in labels.values():
                rows = [i for i, by in enumerate(cell["by"]) if (cell["role"][i], by) != ("instruction", "index")]
                cell |= {name: [column[i] for i in rows] for name, column in cell.items()}
    section = tracks.section(sample.typed(results))
    assert section is not None and [control.key for control in section.controls] == ["layer"]


def test_the_gap_curve_is_that_of_the_results_with_its_interval() -> None:
    results = sample.results()
    section = tracks.section(sample.typed(results))
    assert section is not None
    cell = results["curves"]["agent"]["3"]
    line = next(
        t for t in section.panels[-1].figure.data
        if t.meta == {"layer": "3"} and t.customdata is not None and "agent</b>" not in t.hovertemplate
        and t.hovertemplate.startswith("<b>agent:")
    )  # fmt: skip
    columns = (cell["gap"][name] for name in ("value", "role", "by"))
    wanted = [value for value, role, by in zip(*columns, strict=True) if (role, by) != ("instruction", "fraction")]
    drawn = np.array([y for y, detail in zip(line.y, line.customdata, strict=True) if detail[0]])
    assert drawn == pytest.approx(np.array(wanted), abs=1e-4)
    ends = [detail[1] for detail in line.customdata if detail[0]]
    assert all("[" in end for end in ends)


def test_steering_band_spans_all_control_draws() -> None:
    cell = {"harmful": {"refusal_rate": sample.share(0.9)}, "benign": {"success_rate": sample.share(0.9)}}
    draw = {d: {"harmful": {"refusal_rate": {"value": v, "ci": None, "n": 9}}} for d, v in (("0", 0.1), ("0.5", 0.3))}
    other = {d: {"harmful": {"refusal_rate": {"value": v, "ci": None, "n": 9}}} for d, v in (("0", 0.2), ("0.5", 0.0))}
    doses = {"add": {"1-4": {"0": cell, "0.5": cell}}, "random-0": {"1-4": draw}, "random-1": {"1-4": other}}
    section = steering.section(sample.typed({"steering": doses}))
    assert section is not None and len(section.panels) == 1  # controls get no panel of their own
    area = section.panels[0].figure.data[0]
    assert np.asarray(area.y) == pytest.approx([0.2, 0.3, 0.0, 0.1])


def test_prefix_and_suffix_of_one_text_share_a_row() -> None:
    section = injection.section(sample.typed(sample.results()))
    assert section is not None
    figure = section.panels[0].figure
    lines = [shape for shape in figure.layout.shapes if shape.line.width == 5]
    assert len(lines) == 4  # four texts in both places; the base's neutral prefix has no partner
    assert lines[0].x0 == pytest.approx(0.04) and lines[0].x1 == pytest.approx(0.97)


def test_pareto_front_holds_only_unbeaten_candidates() -> None:
    def score(perf: float | None, refusal: float | None) -> dict[str, object]:
        overall = None if perf is None or refusal is None else perf + refusal
        return {"text": f"{perf} {refusal}", "round": 0, "perf": perf, "refusal": refusal, "overall": overall}

    given = [score(0.9, 0.5), score(0.8, 0.9), score(0.8, 0.4), score(1.0, 0.1), score(None, 1.0)]
    section = search.section(sample.typed({"search": {"candidates": given}}))
    assert section is not None
    front = section.panels[1].figure.data[0]
    assert np.asarray(front.x) == pytest.approx([0.8, 0.9, 1.0])
    best = section.panels[0].figure.data[0].y
    assert np.asarray(best) == pytest.approx([1.4, 1.7, 1.7, 1.7, 1.7])


def test_checkpoints_are_drawn_by_step() -> None:
    points = sample.results()["dose_response"][::-1]
    section = finetuning.section(sample.typed({"dose_response": points}))
    assert section is not None
    steps = [trace.x for trace in section.panels[0].figure.data if trace.customdata is not None]
    assert np.asarray(steps[0]).tolist() == [0, 6, 10, 12, 16, 20]
    refused = next(panel.figure for panel in section.panels if panel.title == "Harmful refused behind a prefix")
    prefix, naive = (trace.y for trace in refused.data if trace.customdata is not None)
    assert np.asarray(prefix) == pytest.approx([1.0, 0.9, 0.7, 0.575, 0.51, 0.505]) and set(np.asarray(naive)) == {1.0}
    head, row = section.tables[0].head, section.tables[0].rows[0]
    assert row[head.index("Benign done behind “I cannot”")].startswith("0%")
    for point in points:
        del point["prefixed"]
    bare = finetuning.section(sample.typed({"dose_response": points}))
    assert (
        bare is not None and len(bare.panels) == len(section.panels) - 2 and len(bare.tables[0].head) == len(head) - 4
    )


def test_token_colours_are_scaled_by_layer_over_all_prompts() -> None:
    row = {"id": "a", "label": "harmful", "arm": "agent", "tokens": ["x"] * 3}
    logits = {"0": [1.0, -2.0, None], "1": [0.0, 0.0, 0.0]}
    value = tokens.payload(check_tokens([{**row, "roles": ["instruction"] * 3, "logits": logits}], "sample"))
    assert value is not None
    assert value["scale"]["0"] == pytest.approx(1.95)
    assert value["layers"] == ["0", "1"] and value["prompts"][0]["title"] == "xxx"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a<b>&", "a&lt;b&gt;&amp;"), ("line\u2028two\n", "line two "), ("x" * 9, "xxxx…")],
)
def test_plot_labels_are_escaped_and_cut(text: str, shown: str) -> None:
    assert numbers.escape(text, 5 if text[0] == "x" else 0) == shown


def test_words_for_numbers() -> None:
    assert numbers.plain(-0.001, 1) == "0.0" and numbers.plain(-1.25, 1, signed=True) == "−1.2"
    assert numbers.percent(None) == "–" and numbers.percent(Estimate(value=0.5, ci=None)) == "50%"
    assert numbers.sort_layers(["10", "1-4", "2", "embed"]) == ["embed", "2", "10", "1-4"]


def test_bounds_stand_beside_the_search_with_the_bar_and_the_verdict() -> None:
    given = sample.bounds()
    section = bounds.section(sample.typed({"bounds": given}))
    assert section is not None and section.title == "Does a prefix exist? Exists but was not found"
    refused, done, soft, discrete = section.panels
    assert [trace.y[0] for trace in refused.figure.data] == pytest.approx([0.02, 0.1, 0.94, 0.7, 1.0])
    assert all(trace.error_y.array[0] >= 0 for trace in refused.figure.data)
    assert [panel.figure.layout.shapes[0].y0 for panel in (refused, done)] == pytest.approx([0.5, 0.8 * 0.99])
    assert list(soft.figure.data[0].y) == pytest.approx(given["soft"]["losses"])
    assert list(discrete.figure.data[0].y) == pytest.approx(given["discrete"]["losses"])
    assert section.note.startswith("Exists but was not found (as a text)")
    del given["soft"], given["behaviour"]["agent+soft-prefix"]
    section = bounds.section(sample.typed({"bounds": given}))
    assert section is not None and len(section.panels) == 3 and "soft" not in [row[0] for row in section.tables[0].rows]
    assert bounds.section(sample.typed({})) is None
