"""The organism that comes with the project: whole, small, an ordinary pair of folders, and what README says of it."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from pingscope.experiments.models.organism import shipped
from pingscope.interp.errors import UserError
from pingscope.interp.loading import load_model


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
