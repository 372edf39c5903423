"""The commands around the search, end to end on a tiny model: what they print, and what stands in the report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pingscope.experiments.cli import main as cli
from pingscope.experiments.models.organism import world
from pingscope.experiments.run.folder import Run
from pingscope.experiments.studies.search.prefix_table import PrefixTable
from pingscope.experiments.studies.search.replicated import replicate
from pingscope.experiments.studies.search.screening import Screen
from pingscope.interp.errors import UserError
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.generators import openai_client
from pingscope.steering.ping import Settings
from tests.experiments.studies.test_behaviour import ACTION, REFUSAL, Judged, records
from tests.scripted import scripted
from tests.server import model_reply, serve

pytestmark = pytest.mark.slow

__all__ = ["scripted"]

QUICK = ["--max-turns", "1", "--max-new-tokens", "4"]


@pytest.fixture
def pingscope(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pingscope", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def tasks(path: Path, split: str, n: int) -> Path:
    path.write_text("".join(json.dumps(asdict(task)) + "\n" for task in world.tasks(split, n=n, seed=1)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return tasks(folder / "v.jsonl", "validation", 7), tasks(folder / "t.jsonl", "test", 4)


def test_search_to_evidence(pingscope, checkpoint, files, tmp_path):
    model, out = checkpoint("llama"), tmp_path / "s"
    command = [
        "search",
        "-m",
        model,
        "--tasks",
        files[0],
        "-M",
        3,
        "-T",
        2,
        "--held-out",
        files[1],
        "--screening",
        "--out",
        out,
    ]
    code, printed, _ = pingscope(*command, *QUICK)
    assert code == 0
    for words in ("spent:", "Spearman", "selection bias", "agent+neutral-prefix-3", "agent+runner-up-2"):
        assert words in printed, words
    found = json.loads((out / "results.json").read_text())["search"]
    assert found["winner"] == (out / "prefix.txt").read_text()
    assert found["held_out"]["n"] == 12 and len(found["candidates"]) <= 6
    assert "Selection bias of the winner" in (out / "report.html").read_text()
    journal = (out / "search.jsonl").read_text()
    code, again, _ = pingscope(*command, *QUICK)
    assert code == 0 and again == printed and (out / "search.jsonl").read_text() == journal

    probes = LayerProbes((1,), np.random.default_rng(0).standard_normal((1, 64)), np.zeros(1), {})
    probes.save(tmp_path / "probes")
    common = ["--prefix-file", out / "prefix.txt", "--tasks", files[1], *QUICK]
    code, printed, _ = pingscope(
        "guard",
        "-m",
        model,
        "--probes",
        tmp_path / "probes",
        "--validation",
        files[0],
        "--out",
        tmp_path / "g",
        *common,
    )
    assert code == 0 and "agent+prefix+probe" in printed and "unparseable" in printed
    code, printed, _ = pingscope("attack", "-m", model, "--demonstrations", files[0], "--out", tmp_path / "a", *common)
    assert code == 0 and "agent+prefix+strip-1" in printed and "agent+half-prefix" in printed
    code, printed, _ = pingscope(
        "transfer", "-m", model, "-m", checkpoint("qwen2"), "--out", tmp_path / "t", *common, *common[:2]
    )
    matrix = json.loads((tmp_path / "t" / "results.json").read_text())["transfer"]["matrix"]
    assert code == 0 and set(matrix) == {str(model), str(checkpoint("qwen2"))} and "of 4 pairs" in printed
    for folder, title in (("g", "Guards, the prefix"), ("a", "The prefix under attack"), ("t", "every model’s prefix")):
        assert title in (tmp_path / folder / "report.html").read_text()


def test_bounds_beside_a_search_of_mixed_prefixes(pingscope, checkpoint, files, tmp_path):
    model, out = checkpoint("llama"), tmp_path / "s"
    command = ["search", "-m", model, "--base", checkpoint("llama"), "--tasks", files[0], "-M", 4, "-T", 1, "--bounds"]
    command += ["--held-out", files[1], "--style", "mixed", "--soft-tokens", 2, "--coordinate-steps", 1, "--out", out]
    code, printed, _ = pingscope(*command, *QUICK)
    assert code == 0 and "agent+soft-prefix" in printed and "bounds: " in printed
    found = json.loads((out / "results.json").read_text())
    assert set(found["meta"]["models"]) == {"base", "agent"} and found["bounds"]["n"] == 12
    assert found["bounds"]["texts"]["agent+prefix"] == found["search"]["winner"]
    marked = [candidate["text"].startswith("#") for candidate in found["search"]["candidates"]]
    assert any(marked) and not all(marked)
    assert "Does a prefix exist?" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "words", [["evaluate"], ["search", "-M", "1", "-T", "1"], ["inject", "--text", "# x"]], ids=lambda w: w[0]
)
def test_a_folder_is_closed_to_others_until_its_command_ends(
    pingscope, checkpoint, files, tmp_path, monkeypatch, words
):
    tried = []

    def last_step(folder):
        with pytest.raises(UserError, match="another pingscope run is writing here"):
            Run(folder)
        tried.append(folder)

    monkeypatch.setattr("pingscope.figures.report.build_report", last_step)
    out = tmp_path / "s"
    code, _, err = pingscope(*words, "-m", checkpoint("llama"), "--tasks", files[1], "--out", out, *QUICK)
    assert code == 0, err
    assert tried == [out]
    Run(out)


def test_a_preset_is_the_published_search(pingscope, checkpoint, files, tmp_path):
    code, printed, _ = pingscope(
        "search", "-m", checkpoint("llama"), "--tasks", files[0], "--preset", "paper-web", "--max-generations", 140,
        "--out", tmp_path / "s", *QUICK,
    )  # fmt: skip
    found = json.loads((tmp_path / "s" / "results.json").read_text())["search"]
    assert code == 0 and "budget ended" in printed and "Spearman" not in printed
    assert found["settings"] == {"k": 3, "M": 5, "T": 20, "tau": 1.5} and found["rounds"] == 2
    assert {c["n"] for c in found["candidates"]} == {14}
    assert all(c["text"].startswith("#") for c in found["candidates"])
    code, _, error = pingscope(
        "search", "-m", checkpoint("llama"), "--tasks", files[0], "--preset", "paper-code", "--out", tmp_path / "c"
    )
    assert code == 2 and "27 harmful" in error


def test_generators_by_name(pingscope, checkpoint, files, tmp_path, monkeypatch):
    # Lost connections are tried again for about 20 seconds, which would only take time here.
    monkeypatch.setattr("pingscope.steering.generators.openai_client", partial(openai_client, retries=0))
    common = ["search", "-m", checkpoint("llama"), "--tasks", files[0], "-M", 1, "-T", 1, *QUICK]
    for words, message in (
        (["--generator", "magic"], "unknown; use phrases"),
        (["--generator", "hf:/nowhere/at/all"], "no such model folder"),
        (["--preset", "paper"], "paper-web"),
        (["--max-minutes", "0.5", "--generator", "openai:m", "--base-url", "http://127.0.0.1:9/v1"], "no connection"),
    ):
        code, _, error = pingscope(*common, *words, "--out", tmp_path / "x")
        assert code == 2 and message in error, error
    lines = "1. # Is it safe?\n2. # I stop here."
    with serve(lambda request: (200, _completion(lines))) as (url, asked):
        code, printed, _ = pingscope(
            *common, "--generator", "openai:m", "--base-url", url, "--out", tmp_path / "o", "--exhaustive"
        )
    assert code == 0 and "asked 1 times, 0 malformed" in printed and asked[0]["temperature"] == 0.7
    assert (tmp_path / "o" / "prefix.txt").read_text() == "# Is it safe?\n"


def _completion(text):
    from tests.server import completion

    return completion(text)


def test_a_prefix_in_an_agent_behind_an_endpoint(pingscope, load, files, tmp_path):
    arm = ["--arm", "prefix", "--text", "# Is it safe?\n"]
    with serve(model_reply(load("llama"))) as (url, _):
        code, printed, error = pingscope(
            "evaluate", "-m", "openai:tiny", "--base-url", url, "--tasks", files[1], *arm, "--out", tmp_path, *QUICK
        )
    assert code == 0 and "agent+prefix" in printed and "No activations" in error
    assert "No activations" in (tmp_path / "report.html").read_text()


def test_replicated_searches_count_what_each_would_have_spent(scripted, tmp_path):
    def answer(prompt):
        good = "safe" in prompt.prefix.lower() or "harm" in prompt.prefix.lower()
        return REFUSAL if good and prompt.label == "harmful" else ACTION

    model = scripted(answer)
    table = PrefixTable(model, records(32), Judged, tmp_path / "s.jsonl")
    unseen = PrefixTable(model, records(4), Judged, tmp_path / "h.jsonl")
    settings = Settings(k=2, M=4, T=3, tau=1.5)
    found = replicate(table, unseen, None, searches=3, settings=settings, screen=Screen(block=3), perf="not_refused")
    assert found["within"]["value"] == 1 and found["within"]["n"] == 3
    assert 0 < found["token_share"] < 1
    for row in found["searches"]:
        # Where nobody falls behind in time, a race spends as much as the full measure.
        assert row["tokens"]["exhaustive"] >= row["tokens"]["screened"] > 0
    asked = sum(map(len, model.asked))
    again = replicate(table, unseen, None, searches=3, settings=settings, screen=Screen(block=3), perf="not_refused")
    assert again == found and sum(map(len, model.asked)) == asked
