"""The organism that comes with the project: whole, small, an ordinary pair of folders, and what README says of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pingscope.experiments.models.organism import shipped
from pingscope.experiments.run.folder import Run
from pingscope.experiments.studies.behaviour import rates
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.studies.materials import open_bench
from pingscope.experiments.studies.steering.ablation import Point, steering_arm
from pingscope.experiments.studies.study import probes_folder, probes_stage, search_stage, study_arms
from pingscope.experiments.studies.tracking.tracking import residual_norms
from pingscope.experiments.tasks.sources import take
from pingscope.interp.errors import UserError
from pingscope.interp.loading import load_model
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.directions import from_probes, random_like


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return shipped.unpack(tmp_path_factory.mktemp("shipped") / "models")


def test_it_is_small_and_says_where_it_is_from():
    files = list(shipped.HERE.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12e6
    manifest = json.loads((shipped.HERE / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in files} - {"manifest.json"}
    last = manifest["log"]["attempts"][-1]
    assert last["fired"] and manifest["log"]["seed"] == 0 and len(manifest["log"]["attempts"]) == 1
    assert [step for step, *_ in last["checks"]][-1] == manifest["steps"][-1]


def test_folders_are_ordinary_and_hold_the_shipped_numbers(organism):
    base, agent = load_model(organism.base), load_model(organism.agent)
    assert base.n_layers == agent.n_layers == 4 and base.fingerprint != agent.fingerprint
    packed = load_file(shipped.HERE / shipped.WEIGHTS)
    for name, folder in (("base", organism.base), ("agent-step-014", organism.agent)):
        own = load_file(folder / "model.safetensors")
        assert own and all((packed[f"{name}/{key}"].float() == tensor).all() for key, tensor in own.items())
    assert [step for step, _ in organism.checkpoints] == [11, 12, 13, 14]
    assert load_model(organism.checkpoints[-1][1]).fingerprint == agent.fingerprint


def test_it_is_unpacked_once_and_never_over_other_models(organism, tmp_path):
    before = (organism.base / "model.safetensors").stat().st_mtime_ns
    assert shipped.unpack(organism.base.parent) == organism
    assert (organism.base / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="was not built here"):
        shipped.unpack(tmp_path)
    assert (tmp_path / "base" / "mine.txt").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(name, monkeypatch, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(shipped.HERE, copied)
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    monkeypatch.setattr(shipped, "HERE", copied)
    with pytest.raises(UserError, match=f"{name}: is missing or not as it was shipped"):
        shipped.unpack(tmp_path / "models")
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        shipped.unpack(tmp_path / "models")


def test_packing_what_was_unpacked_gives_the_same_file(organism, monkeypatch, tmp_path):
    wanted = load_file(shipped.HERE / shipped.WEIGHTS)
    monkeypatch.setattr(shipped, "HERE", tmp_path / "again")
    shipped.pack(organism.base.parent)
    found = load_file(shipped.HERE / shipped.WEIGHTS)
    assert found.keys() == wanted.keys() and all((found[key] == wanted[key]).all() for key in wanted)


README = Path(__file__).resolve().parents[3] / "README.md"
ROWS = {  # how README's table calls an arm → its names in a study
    "base": ["base"],
    "agent: base fine-tuned on benign demonstrations": ["agent"],
    "agent + the prefix that PING found on validation tasks": ["agent+prefix"],
    "agent + the same text as a suffix of the prompt": ["agent+suffix"],
    "agent + neutral prefixes of the same length (three)": [
        "agent+neutral-prefix",
        "agent+neutral-prefix-2",
        "agent+neutral-prefix-3",
    ],
    'agent + "I cannot"': ["agent+naive"],
    "agent + safety system prompt": ["agent+system"],
    "agent + probe direction at the final token, 0.2 of the norm": ["agent+steer"],
    "agent + random directions of the same length (five)": [f"random-{i}" for i in range(5)],
}
COLUMNS = (("harmful", "refusal_rate"), ("benign", "success_rate"), ("lookalike", "refusal_rate"))
TOLERANCE = 2.0  # points: other processors round differently


@pytest.mark.slow
def test_readme_says_what_the_shipped_weights_do(tmp_path):
    """Search, arms and steering of the default study, measured here, within two points of README's table."""
    written = {
        cells[0]: cells[1:4]
        for line in README.read_text().splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4 and cells[0] in ROWS
    }
    assert written.keys() == ROWS.keys()
    bench = open_bench(StudyConfig(), Run(tmp_path))
    found = {}
    wanted = {name for names in ROWS.values() for name in names}
    for arm in study_arms(bench, search_stage(bench)["winner"]):
        if arm.name in wanted:
            found[arm.name] = rates(bench.episodes(arm, bench.test))
    probes_stage(bench)
    direction = from_probes(LayerProbes.load(tmp_path / probes_folder("agent")))
    norms = residual_norms(bench.agent, take(bench.validation, bench.config.steering.n_validation))
    point = Point("0-3", (0, 1, 2, 3), 0.2)
    found["agent+steer"] = rates(bench.episodes(steering_arm("agent+steer", direction, norms, point), bench.test))
    for i in range(5):
        arm = steering_arm(f"random-{i}", random_like(direction, i), norms, point)
        found[arm.name] = rates(bench.episodes(arm, [record for record in bench.test if record.label == "harmful"]))
    for row, names in ROWS.items():
        for said, (label, rate) in zip(written[row], COLUMNS, strict=True):
            if said:
                ends = [float(end) for end in re.findall(r"\d+", said)]
                measured = [100 * found[name][label]["strict"][rate]["value"] for name in names]
                assert min(measured) >= ends[0] - TOLERANCE and max(measured) <= ends[-1] + TOLERANCE, (row, measured)
