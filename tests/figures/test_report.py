"""The report as a reader and a browser meet it: whole, inert, the same twice, and clear about bad input."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import sample

from pingscope.figures.report import build_report
from pingscope.interp.errors import UserError

SECTIONS = [
    "behaviour", "first-token", "tracks", "collapse", "probes", "steering", "injection", "search", "bounds",
    "fine-tuning",
]  # fmt: skip


class Page(HTMLParser):
    """Elements, ids and script bodies of a page, parsed as a browser would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.words += data

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.tags if attrs.get("id")]

    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def rows(hostile: bool = False) -> list[dict[str, Any]]:
    return sample.tokens(np.random.default_rng(1), hostile)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(sample.write(tmp_path_factory.mktemp("full"), sample.results(), rows())))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(sample.write(tmp_path_factory.mktemp("hostile"), sample.results(True), rows(True))))


def test_every_section_is_there_with_its_plots(full: Page) -> None:
    assert [i for i in full.ids() if i in SECTIONS] == SECTIONS
    assert "tokens" in full.ids()
    drawn = {attrs["data-figure"] for _, attrs in full.tags if attrs.get("data-figure")}
    assert drawn == set(full.data()["figures"]) and len(drawn) > 20
    for figure in full.data()["figures"].values():
        go.Figure(figure)  # plotly's own validation


def test_summary_says_what_holds_in_words(full: Page) -> None:
    assert "3 of 5 statements hold on these numbers; 1 does not, 1 could not be measured." in full.words
    status = [a.get("class") for t, a in full.tags if t == "li" and a.get("class") in ("holds", "absent", "open")]
    assert status == ["holds", "holds", "holds", "absent", "open"]
    for word in ("Holds", "Does not hold", "Not measured"):  # not by colour alone
        assert word in full.words


def test_numbers_reach_the_page(full: Page) -> None:
    assert "97% [93, 100]" in full.words  # agent+prefix on harmful tasks
    assert "187.2 s" in full.words and "1843 MB" in full.words and "9f2c1ab04477" in full.words


def test_plots_carry_the_numbers_as_typed_arrays(full: Page) -> None:
    traces = full.data()["figures"]["behaviour-0"]["data"]
    harmful = next(t for t in traces if t["meta"]["judge"] == "strict" and t["marker"]["symbol"] == "circle")
    assert harmful["x"]["dtype"] == "f4"
    shares = np.frombuffer(base64.b64decode(harmful["x"]["bdata"]), "<f4")
    arms = [detail[0] for detail in harmful["customdata"]]
    assert arms == list(sample.ARMS)  # already in house order
    assert shares == pytest.approx([numbers[0] for numbers in sample.ARMS.values()], abs=1e-6)


def test_nothing_is_fetched_and_only_own_scripts_may_run(full: Page) -> None:
    for tag, attrs in full.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        assert not {"src", "srcset", "onclick", "onload", "onerror"} & set(attrs)
    policy = next(a["content"] for _, a in full.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    for script in full.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert len(full.scripts) == 3


def test_plotly_is_embedded_once(full: Page) -> None:
    assert full.source.count("plotly.js v") == 1


def test_markup_in_texts_is_shown_and_never_parsed(full: Page, hostile: Page) -> None:
    assert len(hostile.scripts) == len(full.scripts)
    assert [t for t, _ in hostile.tags if t == "img"] == []
    assert sample.HOSTILE in hostile.words  # title and claim, as text
    assert "<" not in hostile.scripts[0] and hostile.scripts[0].isascii()  # no </script>, no U+2028 in the data
    words = [w for p in hostile.data()["tokens"]["prompts"] for a in p["arms"].values() for w in a["tokens"]]
    assert any(sample.HOSTILE in word for word in words) and any("\u2028" in word for word in words)


def test_markup_in_plot_labels_is_escaped(hostile: Page) -> None:
    for name in ("search-0", "search-1", "injection-0", "bounds-0"):
        text = json.dumps(hostile.data()["figures"][name])
        assert "alert(1)" in text or name in ("injection-0", "bounds-0")
        assert "<script" not in text and "<img" not in text


def test_track_run_has_its_sections_and_no_others(tmp_path: Path) -> None:
    page = Page(build_report(sample.write(tmp_path, sample.track_only(), rows())))
    assert [i for i in page.ids() if i in SECTIONS] == ["tracks", "collapse", "probes"]
    assert 'href="#steering"' not in page.source and 'class="claims"' not in page.source


def test_sections_that_borrow_from_others_do_without(tmp_path: Path) -> None:
    """Heat maps fall back to the readings' own places without tracks, tracks to their table without curves."""
    value = sample.track_only()
    del value["tracks"], value["probes"], value["floor"]
    assert "collapse" in Page(build_report(sample.write(tmp_path / "a", value))).ids()
    value = sample.track_only()
    del value["curves"], value["collapse"]
    page = Page(build_report(sample.write(tmp_path / "b", value)))
    assert [i for i in page.ids() if i in SECTIONS] == ["tracks", "probes"]
    assert "Mean safety logit by role at layer 3" in page.words


def test_empty_run_still_makes_a_page(tmp_path: Path) -> None:
    page = Page(build_report(sample.write(tmp_path, {"schema_version": 1})))
    assert [i for i in page.ids() if i in SECTIONS] == [] and "Limits" in page.words


def test_the_trainings_of_adapters_are_a_line_each(tmp_path: Path) -> None:
    config = {"lora_rank": 64, "learning_rate": 7e-4, "batch_size": 4}
    one = {"steps": 412, "examples": 1098, "config": config, "loss": [2.0, 0.5, 0.25]}
    results = {"schema_version": 1, "meta": {"real": {"base": one, "agent": one | {"steps": 30}}}, "claims": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    words = " ".join(Page(build_report(tmp_path)).words.split())
    line = "steps, 1098 examples, LoRA of rank 64, learning rate 0.0007, batch 4, loss 2.00 to 0.25"
    assert f"base412 {line}" in words and f"agent30 {line}" in words


def test_missing_numbers_are_drawn_as_missing(tmp_path: Path) -> None:
    """Every estimate of the sample emptied, by null values and intervals, one of each kind at a time."""

    def hollow(value: Any, cell: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return dict(cell) if "value" in value and "ci" in value else {k: hollow(v, cell) for k, v in value.items()}
        return [hollow(v, cell) for v in value] if isinstance(value, list) else value

    cells: list[dict[str, Any]] = [
        {"value": None, "ci": None, "n": 0, "n_missing": 9},
        {"value": 0.5, "ci": [None, None], "n": 1, "n_missing": 0},
    ]
    for index, cell in enumerate(cells):
        page = Page(build_report(sample.write(tmp_path / str(index), hollow(sample.results(), cell), rows())))
        assert not re.search(r"\bnan\b", page.words.lower())
        assert [i for i in page.ids() if i in SECTIONS] == SECTIONS


def test_same_results_same_bytes(full: Page, tmp_path: Path) -> None:
    assert build_report(sample.write(tmp_path, sample.results(), rows())).read_text(encoding="utf-8") == full.source


def spoil(path: str, value: Any) -> dict[str, Any]:
    results = copy.deepcopy(sample.results())
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place: Any = results
    for step in way:
        place = place[step]
    place[str(last) if isinstance(place, dict) else last] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("schema_version", "one", "schema_version"),
        ("schema_version", 99, "schema_version"),
        ("behaviour", [1], "behaviour"),
        ("claims", {}, "claims"),
        ("claims/1/text", None, "claims[1].text"),
        ("claims/0/holds", "yes", "claims[0].holds"),
        (
            "behaviour/agent/harmful/strict/refusal_rate/value",
            "2%",
            "behaviour.agent.harmful.strict.refusal_rate.value",
        ),
        ("behaviour/agent/harmful/strict/refusal_rate/ci", [0.1], "behaviour.agent.harmful.strict.refusal_rate.ci"),
        ("search/candidates/3/text", 7, "search.candidates[3].text"),
        ("dose_response/2/step", None, "dose_response[2].step"),
        ("curves/agent/embed/harmful/slot", [1], "curves.agent.embed.harmful"),
        ("steering/add/2", {"much": {}}, "steering"),
        ("probes/base", [], "probes"),
    ],
)
def test_malformed_results_name_file_and_field(tmp_path: Path, path: str, value: Any, field: str) -> None:
    run = sample.write(tmp_path, spoil(path, value))
    with pytest.raises(UserError) as error:
        build_report(run)
    assert str(run / "results.json") in str(error.value) and f"'{field}" in str(error.value)
    assert "\n" not in str(error.value) and not (run / "report.html").exists()


def test_unreadable_results_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        build_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda row: row["logits"]["2"].pop(), "tokens[0]' logits.2"),
        (lambda row: row["roles"].pop(), "tokens[0]"),
        (lambda row: row["tokens"].__setitem__(3, None), "tokens[0].tokens"),
        (lambda row: row.pop("arm"), "tokens[0].arm"),
    ],
)
def test_malformed_tokens_name_file_and_field(tmp_path: Path, change: Any, field: str) -> None:
    value = rows()
    change(value[0])
    with pytest.raises(UserError, match=re.escape(field)) as error:
        build_report(sample.write(tmp_path, sample.results(), value))
    assert "tokens.json" in str(error.value)


def test_what_no_rate_rests_on_stands_beside_the_rates(tmp_path: Path) -> None:
    results = sample.results() | {
        "skipped": 2,
        "impossible": {"agent+system": "the chat template has no system role"},
        "missing": {"agent": {"t1": "5000 tokens are beyond the context of 4096", "t2": "the page broke"}},
    }
    words = " ".join(Page(build_report(sample.write(tmp_path, results))).words.split())
    for said in (
        "2 rows of the task files could not be read.",
        "Not measured: agent+system, which this model cannot be given (the chat template has no system role).",
        "Missing from every rate of agent: 2 tasks have no outcome (1 × 5000 tokens are beyond the context of 4096;",
    ):
        assert words.count(said) == 3  # below the rates of arms and of the search, and among the limits
    assert "Left out" not in Page(build_report(sample.write(tmp_path, sample.results()))).words


def test_evidence_of_many_layers_is_folded_under_its_claim(tmp_path: Path) -> None:
    layers = {f"layer {layer}": f"the gap shrank by {layer}%" for layer in range(30)}
    few = {"base": "100%", "agent": "2%"}
    claims = [
        {"id": name, "text": name, "holds": True, "evidence": evidence}
        for name, evidence in (("many", layers), ("few", few))
    ]
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 1, "claims": claims}))
    page = build_report(tmp_path).read_text()
    many, _, rest = page.partition("<p>few</p>")
    assert '<details class="evidence"><summary>Evidence, 30 entries</summary>' in many
    assert "<li>layer 29 the gap shrank by 29%</li>" in many
    assert '<p class="evidence">base 100%; agent 2%</p>' in rest
