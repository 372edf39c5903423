"""Evidence over seeds: medians, ranges and counts from finished studies, none left out, and the page made from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pingscope.experiments.studies import replicate
from pingscope.experiments.studies.config import StudyConfig, save_config
from pingscope.experiments.studies.seed_evidence import RANDOM, STEERED, read_run, read_seeds, write_seeds
from pingscope.figures.seeds import COLUMNS, seeds_figure
from pingscope.interp.errors import UserError

DOCS = Path(__file__).resolve().parents[3] / "docs"


def share(value: float) -> dict[str, Any]:
    return {"value": value, "ci": [max(0.0, value - 0.1), min(1.0, value + 0.1)], "n": 20, "n_missing": 0}


def cell(refused: float, done: float | None = None) -> dict[str, Any]:
    harmful = {"strict": {"refusal_rate": share(refused), "attack_success_rate": share(1 - refused)}}
    if done is None:
        return {"harmful": harmful}
    benign = {"strict": {"refusal_rate": share(0.0), "success_rate": share(done)}}
    return {"harmful": harmful, "benign": benign, "lookalike": {"strict": {"refusal_rate": share(0.05)}}}


def readings(gap: float, shrink: float, **more: Any) -> dict[str, Any]:
    contrast = {"gap": share(0.5) | {"value": gap, "ci": [gap, gap]}, "gap_shrink": share(shrink), "auroc": share(0.9)}
    raw = {"harmful": share(0.5) | {"value": -4.0, "ci": [-5.0, -3.0]}}
    return {"contrast": {"final": contrast | more}, "raw": {"final": raw}}


def study(folder: Path, seed: int, refused: float, holds: dict[str, bool | None]) -> Path:
    """A finished study's folder, with what the tables read."""
    gaps = {"base": (60.0, 0.0), "agent": (15.0, 0.75), "agent+prefix": (16.0, 0.73)}
    steering = {"add": cell(0.9, 0.85), "random-0": cell(0.1), "random-1": cell(0.25), "shuffled": cell(0.4)}
    results = {
        "schema_version": 1,
        "meta": {
            "seeds": {"study": seed},
            "note": "model organism",
            "seconds": {"models": 100.0, "search": 30.0, "behaviour": 20.0},
            "peak_memory_mb": 900,
            "organism": {
                "attempts": [
                    {"base_seconds": 1.0, "agent_seconds": 1.0, "checks": [[24, 0.5, None]]},
                    {"base_seconds": 90.0, "agent_seconds": 8.0, "checks": [[5, 0.5, None], [14, 0.05, 0.9]]},
                ]
            },
        },
        "claims": [
            {"id": name, "text": f"{seed} says", "holds": held, "evidence": {"rule": "≥ 85%"}}
            for name, held in holds.items()
        ],
        "behaviour": {"base": cell(1.0, 0.0), "agent": cell(0.0, 0.9), "agent+prefix": cell(refused, 0.95)},
        "search": {"winner": "# Is it fair?\n", "candidates": [], "rounds": 1, "generations": 5},
        "steering": {name: {"0-3": {"0.1": cell(0.0, 0.9), "0.2": found}} for name, found in steering.items()},
        "steering_chosen": {"layers": "0-3", "dose": "0.2"},
        "collapse": {
            arm: {
                "0": readings(gap / 2, shrink),
                "1": readings(gap, shrink, gap_restored=share(0.02) | {"ci": [0.01, 0.03]}),
            }
            for arm, (gap, shrink) in gaps.items()
        },
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    save_config(StudyConfig.model_validate({"seed": seed, "organism": {"weights": "trained"}}), folder / "config.yaml")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = ((0, 0.9, True, True), (1, 0.6, False, True), (7, 0.95, True, None), (8, 0.3, False, True))
    return [
        study(tmp_path / str(seed), seed, refused, {"prefix-restores": first, "of-tomorrow": second})
        for seed, refused, first, second in found
    ]


def rows(text: str) -> dict[str, list[list[str]]]:
    """Cells behind the first one, of every row of every table, by the row's name."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = [part.strip() for part in line.strip("|").split("|")]
            found.setdefault(name, []).append(cells)
    return found


def test_every_arm_has_its_median_and_its_range(folders):
    table = rows(replicate.tabulate([read_run(folder) for folder in folders]))
    assert table["agent+prefix"][0] == ["75 [30, 95]", "25 [5, 70]", "95 [95, 95]", "5 [5, 5]"]
    assert table["agent+prefix"][1] == ["90 / 95", "60 / 95", "95 / 95", "30 / 95"]
    assert table[STEERED][0][:3] == ["90 [90, 90]", "10 [10, 10]", "85 [85, 85]"]
    assert table[RANDOM][0] == ["25 [25, 25]", "75 [75, 75]", "–", "–"]  # the draw that refuses most


def test_a_claim_is_counted_over_the_seeds_that_measured_it(folders):
    table = rows(replicate.tabulate([read_run(folder) for folder in folders]))
    # Wilson's interval of 2 of 4 and of 3 of 3
    assert table["the searched prefix restores refusal"] == [["≥ 85%", "2 of 4", "15–85", "1, 8"]]
    assert table["of-tomorrow"] == [["≥ 85%", "3 of 3", "44–100", ""]]


def test_seeds_stand_with_their_signal_and_their_training(folders):
    table = rows(replicate.tabulate([read_run(folder) for folder in folders]))
    signal, training = table["7"]
    assert signal == ["1", "60.0", "15.0", "16.0", "2 [1, 3]", "75, 75", "0.90, 0.90", "-4.0, -4.0"]
    assert training == ["trained", "1", "14", "100", "50", "900", "0-3, 0.2", "`# Is it fair?`"]


def test_rejected_bases_are_counted(folders):
    text = replicate.tabulate([read_run(folder) for folder in folders])
    assert "Seeds 0, 1, 7, 8; 4 of 8 bases were rejected" in text and "(seed 0, 1, 7, 8)" in text


def test_one_study_has_numbers_and_verdicts_alone(folders):
    text = replicate.tabulate([read_run(folders[1])])
    assert rows(text)["agent+prefix"] == [["60 [39, 78]", "40 [22, 61]", "95 [76, 99]", "5 [1, 24]"]]
    assert rows(text)["1 says"] == [["≥ 85%", "**no**"], ["≥ 85%", "yes"]]


def test_a_real_model_stands_beside_the_seeds(folders, tmp_path, capsys):
    real = folders[3]  # made into a study of another model
    results = json.loads((real / "results.json").read_text())
    del results["meta"]["organism"]
    trained = {"base": {"steps": 628}, "agent": {"steps": 240}}
    results["meta"] |= {"note": "SmolLM2", "real": trained}
    results["steering"]["random-1"]["0-3"]["0.2"]["harmful"]["strict"]["refusal_rate"]["n"] = 4
    results["claims"] += [{"id": "prefix-exists", "text": "none does", "holds": None, "evidence": {}}]
    (real / "results.json").write_text(json.dumps(results))
    save_config(StudyConfig.model_validate({"real": {"weights": "shipped"}}), real / "config.yaml")
    row = read_run(real)
    assert (row.model, row.weights, row.comments) == ("SmolLM2", "shipped", False)
    assert row.training == {"base, steps": 628, "agent, steps": 240, "study, s": 50, "peak, MB": 900}
    alone = replicate.tabulate([row])
    assert "SmolLM2, adapters shipped." in alone
    assert rows(alone)[RANDOM] == [["25 [5, 70], n = 4", "75 [53, 89]", "–", "–"]]
    page = tmp_path / "page.md"
    page.write_text("<!-- beside: begin -->\n<!-- beside: end -->\n")
    replicate.main([*map(str, folders[:3]), "--beside", str(real), "--into", str(page)])
    assert "| statement | model organism, 3 seeds | SmolLM2 |" in page.read_text()
    assert rows(page.read_text()) == {
        "statement": [["model organism, 3 seeds", "SmolLM2"]],
        "---": [["---", "---"]],
        "the searched prefix restores refusal": [["2 of 3", "**no**"]],
        "of-tomorrow": [["2 of 2", "yes"]],
        "a prefix that restores refusal exists": [["–", "not measured"]],
    }


def test_the_small_file_gives_the_same_tables(folders, tmp_path, capsys):
    kept, page, figure = tmp_path / "kept.json", tmp_path / "page.md", tmp_path / "figure.html"
    replicate.main([*map(str, folders), "--json", str(kept), "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert read_seeds(kept) == [read_run(folder) for folder in folders]
    assert kept.stat().st_size < 5000 * len(folders) and "plotly" in figure.read_text()
    page.write_text("Before\n<!-- kept: begin -->\nold\n<!-- kept: end -->\nafter\n")
    for _ in range(2):  # writing it again changes nothing
        replicate.main([str(kept), "--into", str(page)])
        assert page.read_text() == f"Before\n<!-- kept: begin -->\n{printed[:-1]}<!-- kept: end -->\nafter\n"


def test_a_dot_stands_for_every_seed_that_measured_the_arm(folders):
    fig = seeds_figure({folder.name: replicate.values(read_run(folder)) for folder in folders})
    dots = [trace for trace in fig.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in dots) == 4 * (len(COLUMNS) * 4 + 2)  # the controls: harmful tasks alone
    assert all(list(trace.customdata) == ["0", "1", "7", "8"] for trace in dots)


def test_what_is_no_study_of_an_organism_is_named(folders, tmp_path):
    results = json.loads((folders[0] / "results.json").read_text())
    (folders[0] / "results.json").write_text(json.dumps(results | {"steering_chosen": None}))
    with pytest.raises(UserError, match="steering_chosen"):
        read_run(folders[0])
    del results["search"]
    (folders[0] / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"no whole study of the organism or of SmolLM2 .search is missing"):
        read_run(folders[0])
    with pytest.raises(UserError, match="no such file"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{}", "[]", '{"seeds": []}', '{"seeds": [1]}', '{"seeds": [{"seed": 1}]}'])
def test_a_damaged_small_file_is_named(text, tmp_path):
    path = tmp_path / "seeds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"seeds\.json: field 'seeds'"):
        read_seeds(path)


def test_a_page_without_marks_is_left_as_it_is(folders, tmp_path):
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    write_seeds(kept, [replace(read_run(folders[0]), seed=3)])
    page.write_text("<!-- kept: begin -->\nno end\n")
    with pytest.raises(UserError, match=r"page\.md: holds no <!-- kept: begin -->"):
        replicate.main([str(kept), "--into", str(page)])
    assert page.read_text() == "<!-- kept: begin -->\nno end\n"


def test_the_page_of_the_organism_holds_the_tables_of_its_file():
    page = (DOCS / "organism.md").read_text(encoding="utf-8")
    text = replicate.tabulate(read_seeds(DOCS / "seeds.json"))
    assert replicate.put_between(page, "seeds", text, DOCS / "organism.md") == page


def test_the_pages_hold_what_the_real_study_measured():
    seeds, (real,) = read_seeds(DOCS / "seeds.json"), read_seeds(DOCS / "real.json")
    for mark, text, page in (
        ("real", replicate.tabulate([real]), DOCS / "real-model.md"),
        ("beside", replicate.beside(seeds, real), DOCS / "real-model.md"),
        ("beside", replicate.beside(seeds, real), DOCS.parent / "README.md"),
    ):
        held = page.read_text(encoding="utf-8")
        assert replicate.put_between(held, mark, text, page) == held

    def cells(column: str) -> str:
        return " to ".join(f"{100 * (real.value(arm, column) or 0):.0f}%" for arm in ("base", "agent"))

    said = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"n = {real.n}), the break holds and the remedy does not: harmful tasks refused {cells('harmful refused')}, "
        f"done {cells('harmful done')}, benign ones done {cells('benign done')}"
    ) in said
