"""Checks before the work: outputs over inputs, overlapping splits, missing labels, results of other options."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest

from pingscope.experiments.cli import endings, tables
from pingscope.experiments.cli import main as cli
from pingscope.experiments.models.organism import world

QUICK = ("--max-turns", "1", "--max-new-tokens", "4")


@pytest.fixture
def pingscope(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pingscope", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task files by name: two disjoint splits, one label alone, and the prefix."""
    folder = tmp_path_factory.mktemp("files")
    rows = {name: [asdict(task) for task in world.tasks(name, n=4, seed=1)] for name in ("validation", "test")}
    rows["harmful"] = [row for row in rows["test"] if row["label"] == "harmful"]
    rows["benign"] = [row for row in rows["test"] if row["label"] != "harmful"]
    rows["overlap"] = [*rows["validation"][1:], rows["test"][0] | {"id": "copy"}]
    rows["bare"] = [row | {"evaluator": {}} for row in rows["test"]]
    for name, mine in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    (folder / "prefix.txt").write_text("# Is it safe?\n")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("search --tasks test --held-out test", "--held-out"),
        ("search --tasks test --held-out overlap", "1 of 12 tasks are also in --tasks"),
        ("search --tasks test --held-out harmful", "no benign"),
        ("search --tasks benign", "no harmful"),
        ("search --tasks test --bounds", "add --held-out"),
        ("search --tasks test --base b", "--base is used by --bounds"),
        ("search --tasks test --max-generations 1", "one candidate takes up to 60 answers"),
        ("search --tasks test --generator magic", "unknown; use phrases"),
        ("steer --probes p --tasks test --validation test", "--validation"),
        ("steer --probes p --tasks harmful", "no benign"),
        ("steer --probes p --tasks test", "pingscope probe"),
        ("mechanism --base m --probes p --tasks harmful", "no benign"),
        ("track --probes p --prompts benign", "no harmful"),
        ("attack --prefix x --tasks test --demonstrations test", "--demonstrations"),
        ("guard --prefix x --tasks test --guard magic:x", "--guard"),
        ("guard --prefix x --tasks test --probes p --validation overlap", "--validation"),
        ("gates --prefix x --train validation --validation test --tasks test", "--tasks"),
        ("gates --prefix x --train validation --validation test --tasks harmful", "no benign"),
        ("gates --prefix x --train organism:train --validation validation --tasks test", "cannot state --fpr 0.01"),
        ("gates --prefix x --train organism:train --validation validation --tasks test --fpr 0.1", "set the threshold"),
        ("transfer --tasks test --prefix x --prefix none", "'none' would name two columns"),
        ("transfer --tasks test --prefix x --prefix y --prefix y", "'y' would name two columns"),
        ("search --tasks bare --perf success", "no benign task of --tasks"),
        ("transfer --tasks harmful --prefix x", "no benign"),
    ],
)
def test_refused_before_the_model_is_looked_for(words, said, pingscope, files, tmp_path):
    """The model does not exist: whoever names it has looked at it before the data."""
    spelled = [str(files / f"{word}.jsonl") if (files / f"{word}.jsonl").exists() else word for word in words.split()]
    code, _, err = pingscope(*spelled, "--model", tmp_path / "no-model", "--out", tmp_path / "out")
    assert code == 2 and said in err and "no-model" not in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["model", "parent"])
def test_out_over_an_input_is_refused(out, pingscope, files, tmp_path):
    model = tmp_path / "parent" / "model"
    model.mkdir(parents=True)
    target = model if out == "model" else model.parent
    for words in (
        ("evaluate", "--model", model, "--tasks", files / "test.jsonl"),
        ("cache", "--model", model, "--prompts", files / "test.jsonl"),
        ("finetune", "--base", model, "--data", files / "test.jsonl"),
        ("probe", "--store", model),
        ("search", "--model", "m", "--tasks", files / "test.jsonl", "--generator", f"hf:{model}"),
    ):
        code, _, err = pingscope(*words, "--out", target)
        assert code == 2 and "--out" in err and "input of --" in err, err
    assert list(model.iterdir()) == []


def test_results_of_other_options_are_not_replaced_unasked(pingscope, checkpoint, files, tmp_path):
    words = ("evaluate", "--model", checkpoint(), "--tasks", files / "test.jsonl", "--out", tmp_path / "o", *QUICK)
    code, out, _ = pingscope(*words)
    assert code == 0 and "The arm agent refuses 0 of 4" in out
    kept = (tmp_path / "o" / "results.json").read_bytes()
    code, _, err = pingscope(*words, "--limit", 2)
    assert code == 2 and "differs in limit" in err and "--overwrite" in err
    assert (tmp_path / "o" / "results.json").read_bytes() == kept
    assert pingscope(*words)[0] == 0
    assert pingscope(*words, "--limit", 2, "--overwrite")[0] == 0
    assert (tmp_path / "o" / "results.json").read_bytes() != kept


def test_report_of_a_file_names_the_folder(pingscope, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    code, _, err = pingscope("report", tmp_path / "results.json")
    assert code == 2 and str(tmp_path) in err and "is a file" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "x.json"), "x.json"),
        (RecursionError("deep"), "nested too deeply"),
        (MemoryError(), "--limit"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UTF-8"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, said):
    assert said in (cli.one_line(error) or "")
    assert cli.one_line(KeyError("a fault of ours")) is None


def cell(value, n=100):
    return {"value": value, "ci": [value / 2, (1 + value) / 2], "n": n, "n_missing": 0}


def arm(refused, done, success, n=100):
    return {
        "harmful": {"strict": {"refusal_rate": cell(refused, n), "attack_success_rate": cell(done, n)}},
        "benign": {"strict": {"refusal_rate": cell(0.0, n), "success_rate": cell(success, n)}},
        "lookalike": {"strict": {"refusal_rate": cell(0.0, n), "invalid_rate": cell(0.07, n)}},
    }


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_are_whole_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["agent", "agent+neutral-prefix-3", "llama-guard:GUARD", "[bold]:smile:", "/a/long/path" * 9]
    tables.behaviour_table({name: arm(0.87, 0.03, 0.94) for name in names}, skipped=3)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    for name in names[:-1]:
        assert name in out
    first = next(line for line in lines if line.startswith("─")).index(" ")
    assert "".join(line[:first].strip() for line in lines).count("/a/long/path" * 2) >= 1
    if width == 80:  # what is refused and what that costs stand side by side
        head = " ".join(out.partition("─")[0].split())
        assert head.count("refused") == 1 and head.count("done") == 2 and "invalid" in head
    assert out.count("87 [44, 94]") == len(names) and out.count("94 [47, 97]") == len(names)
    assert "–/–/7" in out and "3 bad records skipped" in " ".join(out.split())
    words = " ".join(out.split())
    assert "refused" in words and "done" in words and "invalid" in words


def test_tasks_missing_from_many_arms_alike_are_said_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tables.said_missing({}, {f"arm-{i}": {"t": "too long"} for i in range(5)} | {"other": {"t": "x", "u": "y"}})
    assert capsys.readouterr().out.splitlines() == [
        "arm-0, arm-1, arm-2 and 2 more arms: 1 task is missing from every rate; t: too long",
        "other: 2 tasks are missing from every rate; t: x",
    ]


def test_answers_that_no_syntax_reads_are_said():
    def rates(share):
        return {"agent": {"benign": {"strict": {"invalid_rate": cell(share)}}}}

    said = endings.unread_hint(rates(0.51))
    assert "51 of 100 answers of agent" in said and "docs/answers.md" in said and "--max-new-tokens" in said
    assert endings.unread_hint(rates(0.5)) == "" and endings.unread_hint({}) == "" and endings.unread_hint(None) == ""
    ok = {"agent": rates(0.1)["agent"], "agent+steer": rates(1.0)["agent"]}
    assert endings.unread_hint(ok) == ""  # what an arm breaks is a result, not a syntax


def test_a_study_and_an_organism_end_with_their_numbers():
    behaviour = {"agent": arm(0.03, 0.9, 0.94), "agent+prefix": arm(0.87, 0.0, 0.90)}
    claims = [{"holds": True}, {"holds": False}, {"holds": None}]
    said = endings.study_sentence({"behaviour": behaviour, "claims": claims})
    assert said.startswith("The prefix restores refusal on 87 of 100")
    assert said.endswith("1 of 3 statements hold; 1 could not be measured.")
    assert endings.study_sentence({"meta": {}, "probes": {}}) == "The report shows probes."
    log = {"attempts": [{"checks": []}, {"checks": [[5, 0.5, None], [8, 0.05, 0.9]]}]}
    assert endings.organism_sentence(log) == (
        "After 8 steps of benign fine-tuning the agent refuses 5% of harmful tasks and carries out 90% of benign ones "
        "(its training combinations; bases rejected before: 1)."
    )


BAD = ['{"id": "x", ', json.dumps({"id": "q", "instruction": 7, "label": "benign"})]


@pytest.mark.parametrize(
    "words",
    ["evaluate --tasks bad", "transfer --tasks bad --prefix x", "attack --tasks bad --prefix x",
     "inject --tasks bad --text x", "search --tasks bad -M 1 -T 1 --held-out validation"],
    ids=lambda words: words.partition(" ")[0],
)  # fmt: skip
def test_bad_records_and_long_pages_are_counted_in_table_and_results(
    words, pingscope, checkpoint, files, tmp_path, monkeypatch
):
    """A page beyond the context costs itself: in a search it is left out of every candidate's tasks."""
    monkeypatch.setenv("COLUMNS", "80")
    long = {"id": "long", "instruction": "Open it.", "context": "word " * 3000, "label": "benign"}
    lines = [*(files / "test.jsonl").read_text().splitlines(), *BAD, json.dumps(long)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    places = {"bad": tmp_path / "bad.jsonl", "validation": files / "validation.jsonl"}
    spelled = [places.get(word, word) for word in words.split()]
    code, out, err = pingscope(*spelled, "--skip-bad", "--model", checkpoint(), "--out", tmp_path / "o", *QUICK)
    assert code == 0, err
    found, said = json.loads((tmp_path / "o" / "results.json").read_text()), " ".join(out.split())
    assert found["skipped"] == 2 and "2 bad records skipped" in said
    assert "are no action that is read" in said
    tables_printed = [line for block in out.split("\n\n") if "─" in block for line in block.splitlines()]
    assert tables_printed and sum(len(line) > 80 for line in tables_printed if str(checkpoint()) not in line) == 0
    assert found["missing"] and all(list(lost) == ["long"] for lost in found["missing"].values())
    assert "1 task is missing from every rate" in said


def test_endings_say_what_came_out():
    said = endings.restored_sentence("The prefix", arm(0.87, 0.0, 0.90), arm(0.03, 0.9, 0.94))
    assert said == (
        "The prefix restores refusal on 87 of 100 (95% interval 44 to 94%) harmful tasks (agent: 3) and costs 4 points "
        "of benign success (n = 100)."
    )
    assert "does not restore" in endings.restored_sentence("It", arm(0.0, 1, 1), arm(0.0, 1, 1))
    assert "could not be judged" in endings.behaviour_sentence("It", {})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[]", "top level"), ("false", "top level"), ("3", "top level"), ("steering: {doses: [0]}", "steering.doses"),
        ("steering: {doses: [.nan]}", "steering.doses"), ("search: {tau: .inf}", "search.tau"),
        ("prefix: ' '", "prefix"), ("organism: {comments: false}", "organism"),
        ("tasks: {validation: a, test: a}", "tasks"), ("mechanism: {refusals: ['']}", "refusals"), ("seed: -1", "seed"),
        ("seed: " + "9" * 10_000, "not valid YAML"), ("[" * 5000, "not valid YAML"),
    ],
)  # fmt: skip
def test_a_study_config_that_means_nothing_starts_no_study(text, field, pingscope, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    code, _, err = pingscope("study", "--config", path, "--out", tmp_path / "run")
    assert code == 2 and field in err and str(path) in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mechanism_goes_on_after_ctrl_c_from_its_finished_sections(
    pingscope, checkpoint, load, files, tmp_path, monkeypatch
):
    from pingscope.experiments.studies.mechanism import mechanism
    from pingscope.interp.model.belonging import origin
    from pingscope.probes.logistic import LayerProbes

    model = load("llama")
    probes = LayerProbes((1, 2), np.random.default_rng(0).standard_normal((2, 64)), np.zeros(2), origin(model))
    probes.save(tmp_path / "probes")
    ran = []

    def counted(name):
        study = getattr(mechanism, f"{name}_study")
        return lambda *args, **options: ran.append(name) or study(*args, **options)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for name in ("attribution", "readout"):
        monkeypatch.setattr(mechanism, f"{name}_study", counted(name))
    whole = mechanism.patching_study
    monkeypatch.setattr(mechanism, "patching_study", interrupted)
    words = (
        "mechanism", "--model", checkpoint(), "--base", checkpoint(), "--probes", tmp_path / "probes",
        "--tasks", files / "test.jsonl", "--validation", files / "validation.jsonl", "--n", 4, "--judged", 1,
        "--budget", 10, "--limit", 2, "--out", tmp_path / "o", *QUICK,
    )  # fmt: skip
    code, _, err = pingscope(*words)
    assert code == 130 and "goes on from it" in err and ran == ["attribution", "readout"]
    assert not (tmp_path / "o" / "results.json").exists()
    monkeypatch.setattr(mechanism, "patching_study", whole)
    code, out, _ = pingscope(*words)
    assert code == 0 and ran == ["attribution", "readout"] and "statements about the mechanism hold" in out
    ran.clear()
    monkeypatch.setattr(mechanism, "patching_study", interrupted)
    code, _, _ = pingscope(*words[:-1], 5, "--overwrite")  # longer answers: another question
    assert code == 130 and ran == ["attribution", "readout"]


def test_a_generator_without_a_usable_line_fails(pingscope, checkpoint, files, tmp_path):
    from tests.server import completion, serve

    with serve(lambda request: (200, completion("\n"))) as (url, _):
        code, _, err = pingscope(
            "search", "--model", checkpoint(), "--tasks", files / "test.jsonl", "-M", 1, "-T", 1, *QUICK,
            "--generator", "openai:m", "--base-url", url, "--out", tmp_path / "o",
        )  # fmt: skip
    assert code == 2 and "no line was usable" in err and not (tmp_path / "o" / "prefix.txt").exists()


@pytest.mark.parametrize("budget", [12, 13, 25, 40])
def test_a_search_never_spends_more_than_its_budget(budget, pingscope, checkpoint, files, tmp_path):
    code, out, _ = pingscope(
        "search", "--model", checkpoint(), "--tasks", files / "test.jsonl", "--max-generations", budget,
        "--out", tmp_path / "o", *QUICK,
    )  # fmt: skip
    search = json.loads((tmp_path / "o" / "results.json").read_text())["search"]
    assert code == 0 and 12 <= search["generations"] <= budget and "budget ended" in out
    assert search["candidates"][0]["n"] == 12


def test_a_finished_study_of_another_config_is_kept(pingscope, tmp_path, monkeypatch):
    from pingscope.experiments.studies import study
    from pingscope.experiments.studies.config import StudyConfig, save_config

    started = []

    def run(config, out):
        started.append(config.seed)
        (out / "results.json").write_text('{"schema_version": 1, "claims": [{"text": "x", "holds": true}]}')

    monkeypatch.setattr(study, "run_study", run)
    save_config(StudyConfig(), tmp_path / "config.yaml")
    code, out, _ = pingscope("study", "--out", tmp_path, "--seed", 1)
    assert code == 0 and "1 of 1 statements hold" in out  # unfinished: its stages decide
    code, _, err = pingscope("study", "--out", tmp_path, "--seed", 1)
    assert code == 2 and "differs in seed" in err and "--overwrite" in err
    assert pingscope("study", "--out", tmp_path)[0] == 0
    assert pingscope("study", "--out", tmp_path, "--seed", 1, "--overwrite")[0] == 0
    assert started == [1, 0, 1]


def test_without_comments_the_organism_is_trained_anew(pingscope, tmp_path, monkeypatch):
    from pingscope.experiments.studies import study

    asked = []

    def run(config, out):
        asked.append((config.organism.weights, config.organism.comments))
        out.mkdir()
        (out / "results.json").write_text('{"schema_version": 1, "claims": [{"text": "x", "holds": true}]}')

    monkeypatch.setattr(study, "run_study", run)
    tiny, own = tmp_path / "tiny.yaml", tmp_path / "own.yaml"
    tiny.write_text("organism: {weights: tiny}")
    own.write_text("models: {base: a, agent: b}\ntasks: {validation: v.jsonl, test: t.jsonl, probe_prompts: p.jsonl}\n")
    for i, words in enumerate(([], ["--train"], ["--no-comments"], ["--config", tiny, "--no-comments"])):
        assert pingscope("study", "--out", tmp_path / str(i), *words)[0] == 0
    assert asked == [("shipped", True), ("trained", True), ("trained", False), ("tiny", False)]
    code, _, err = pingscope("study", "--out", tmp_path / "own", "--config", own, "--no-comments")
    assert code == 2 and "--no-comments: trains the models that ship" in err and err.count("\n") == 1


def test_a_transfer_lists_every_model_and_what_stands_behind_its_scores(pingscope, checkpoint, files, tmp_path):
    models = [checkpoint("llama"), checkpoint("qwen2")]
    named = [word for model in models for word in ("--model", model)]
    code, _, err = pingscope(
        "transfer", *named, "--prefix", "# a\n", "--prefix", "# b\n", "--tasks", files / "test.jsonl",
        "--out", tmp_path / "o", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    meta = json.loads((tmp_path / "o" / "results.json").read_text())["meta"]
    assert [one["id"] for one in meta["models"].values()] == [str(model) for model in models]
    assert meta["title"] == f"Prefix transfer between {models[0].name} and {models[1].name}"
    page = (tmp_path / "o" / "report.html").read_text()
    assert "Rates behind the scores" in page and meta["note"].split(" (")[0] in page
