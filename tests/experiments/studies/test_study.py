"""The main job on a tiny organism: what it leaves, what it reuses, and what interruptions do to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pingscope.experiments.models.organism import world
from pingscope.experiments.run.folder import Run
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.studies.study import run_study
from pingscope.experiments.tasks.records import write_records
from pingscope.interp.errors import UserError

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "organism": {"weights": "tiny"},
    "tasks": {"n_validation": 8, "n_test": 8, "n_probe": 16},
    "search": {"k": 1, "M": 2, "T": 2},
    "bounds": {"soft_tokens": 2, "soft_steps": 3, "coordinate_steps": 1, "candidates": 3, "n": 4},
    "steering": {"doses": [0.25], "random_draws": 1, "n_validation": 4},
    "mechanism": {"n": 4, "judged": 2, "budget": 30},
    "max_turns": 2,
    "max_new_tokens": 6,
    "floor_updates": 2,
}
# What a run was like, not what it found.
CIRCUMSTANCES = ("seconds", "peak_memory_mb", "organism", "threads", "models")


def numbers(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    for name in CIRCUMSTANCES:
        results["meta"].pop(name, None)
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    run_study(StudyConfig.model_validate(TINY), folder)
    return folder


def test_a_run_leaves_the_contracts_files_and_keys(finished):
    for name in ("config.yaml", "report.html", "generations.jsonl", "search.jsonl", "tracks.parquet", "tokens.json"):
        assert (finished / name).is_file(), name
    for name in ("activations", "probes", "directions", "models/base", "models/agent"):
        assert (finished / name).is_dir(), name
    results = numbers(finished)
    arms = set(results["behaviour"])
    assert {"base", "agent", "agent+naive", "agent+prefix", "agent+suffix", "agent+system"} <= arms
    assert {"agent+neutral-prefix", "agent+shuffled-prefix", "base+neutral-prefix"} <= arms
    cell = results["behaviour"]["agent"]["harmful"]["strict"]["refusal_rate"]
    assert set(cell) == {"value", "ci", "n", "n_missing"} and cell["n"] == 8
    assert set(results["behaviour"]["agent"]) == {"harmful", "benign", "lookalike"}
    assert set(results["collapse"]["agent"]["0"]) >= {"raw", "contrast", "shift", "placed", "floor", "controls"}
    assert {"add", "random-0", "shuffled"} == set(results["steering"])
    assert results["dose_response"][0]["step"] == 0
    last = results["dose_response"][-1]  # the agent itself: its prefixes do there what they do among the arms
    assert last["chosen"] and set(last["prefixed"]) == {"agent+prefix", "agent+naive"}
    for arm, found in last["prefixed"].items():
        assert found["harmful"] == results["behaviour"][arm]["harmful"] and "lookalike" not in found
    assert len(results["search"]["candidates"]) <= 4
    meta = json.loads((finished / "results.json").read_text())["meta"]
    (method,) = meta["methods"]
    assert "real" not in meta and "organism" in meta and not any("135 million" in limit for limit in meta["limits"])
    assert "taught what follows a comment" in method and "taught what follows" in (finished / "report.html").read_text()
    assert {claim["id"] for claim in results["claims"]} >= {
        "aligned-base",
        "refusal-lost",
        "suffix",
        "steering-restores",
    }


def test_the_same_prefix_text_is_the_suffix_and_is_never_scored(finished):
    results = numbers(finished)
    texts = {name: arm["text"] for name, arm in results["injection"].items()}
    assert texts["agent+prefix"].strip() == texts["agent+suffix"].strip() == results["search"]["winner"].strip()
    rows = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    assert rows and not any(texts["agent+prefix"].strip() in turn["text"] for row in rows for turn in row["turns"])


def test_logs_hold_no_instructions(finished):
    logged = (finished / "generations.jsonl").read_text() + (finished / "search.jsonl").read_text()
    for task in world.tasks("test", "harmful", 8, 0):
        assert task.instruction not in logged


def test_splits_never_mix():
    sets = {split: {task.pair_id for task in world.tasks(split, n=60)} for split in world.SPLITS}
    chat = {record.pair_id for record in world.chat_instructions("train", 60)}
    assert not sets["validation"] & sets["test"]
    assert not (sets["train"] | chat) & (sets["validation"] | sets["test"])


def test_a_second_run_computes_nothing_and_changes_nothing(finished, capsys):
    before, started = numbers(finished), time.perf_counter()
    rows = (finished / "generations.jsonl").read_bytes()
    run_study(StudyConfig.model_validate(TINY), finished)
    assert "done in" not in capsys.readouterr().err
    assert numbers(finished) == before and (finished / "generations.jsonl").read_bytes() == rows
    assert time.perf_counter() - started < 60


def test_a_changed_input_is_computed_again_and_said(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    changed = TINY | {"steering": TINY["steering"] | {"doses": [0.5]}}
    run_study(StudyConfig.model_validate(changed), folder)
    said = capsys.readouterr().err
    assert "steering: computing again; changed or missing: steering" in said
    assert "behaviour: found" in said
    assert set(next(iter(numbers(folder)["steering"]["add"].values()))) == {"0.5"}


def start(folder: Path, config: Path) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-m",
        "pingscope.experiments.cli.main",
        "study",
        "--config",
        str(config),
        "--out",
        str(folder),
    ]
    # A shell in the background starts its children deaf to Ctrl-C; the study's own reaction is what is tested.
    return subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ.copy(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "at"),
    [
        (signal.SIGKILL, "models/base.json"),
        (signal.SIGKILL, "generations.jsonl"),
        (signal.SIGKILL, "activations"),
        (signal.SIGINT, "search.jsonl"),
    ],
)
def test_interrupted_runs_resume_to_the_same_numbers(sent, at, finished, tmp_path):
    config, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(TINY))
    process = start(folder, config)
    wait_for(folder / at, process)
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    assert not (folder / "results.json").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130 and "goes on from it" in said and "Traceback" not in said
    kept = (folder / "generations.jsonl").read_bytes() if (folder / "generations.jsonl").exists() else b""
    run_study(StudyConfig.model_validate(TINY), folder)
    assert (folder / "generations.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert numbers(folder) == numbers(finished)


def test_two_runs_never_share_a_folder(tmp_path):
    first = Run(tmp_path)
    with pytest.raises(UserError, match="another pingscope run"):
        Run(tmp_path)
    del first


def test_own_models_take_the_same_path(finished, tmp_path):
    """Two folders, three files: what a user brings. The prefix is given, so nothing is searched."""
    for name, records in (
        ("validation", world.tasks("validation", n=6, seed=3)),
        ("test", world.tasks("test", n=6, seed=3)),
        ("chat", world.chat_instructions("train", 12, 3)),
    ):
        write_records(tmp_path / f"{name}.jsonl", records)
    own = TINY | {
        "models": {"base": str(finished / "models/base"), "agent": str(finished / "models/agent")},
        "tasks": {
            "validation": str(tmp_path / "validation.jsonl"),
            "test": str(tmp_path / "test.jsonl"),
            "probe_prompts": str(tmp_path / "chat.jsonl"),
            "n_validation": 6,
            "n_test": 6,
            "n_probe": 12,
        },
        "prefix": "# Is this safe?\n",
    }
    report = run_study(StudyConfig.model_validate(own), tmp_path / "run")
    assert report.is_file()
    results = numbers(tmp_path / "run")
    assert "dose_response" not in results and results["search"]["candidates"] == []
    assert results["injection"]["agent+prefix"]["text"] == "# Is this safe?"


def test_bounds_stand_beside_the_search_where_they_are_asked_for(finished):
    bounds = numbers(finished)["bounds"]
    assert {"agent", "agent+naive", "agent+prefix", "agent+soft-prefix", "agent+discrete-prefix"} == set(
        bounds["behaviour"]
    )
    assert bounds["n"] == 24 and bounds["behaviour"]["agent+soft-prefix"]["harmful"]["strict"]["refusal_rate"]["n"] == 8
    assert bounds["texts"]["agent+prefix"] == numbers(finished)["search"]["winner"] == bounds["discrete"]["start"]
    assert len(bounds["soft"]["losses"]) == 3 and bounds["soft"]["after"] < bounds["soft"]["before"]
    assert bounds["discrete"]["losses"][-1] <= bounds["discrete"]["losses"][0]
    assert bounds["sentence"].startswith(bounds["verdict"])
    assert (finished / "bounds" / "soft_prefix.safetensors").is_file()
    assert 'id="bounds"' in (finished / "report.html").read_text()
    assert "prefix-exists" in {claim["id"] for claim in numbers(finished)["claims"]}
