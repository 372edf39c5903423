"""The precision that `--dtype fast` chooses, and why."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pingscope.interp import UserError, load_model, precision


@pytest.fixture
def able(monkeypatch):
    """A processor that computes in bfloat16, whatever this one does."""
    monkeypatch.setattr(precision, "_bfloat16_on", lambda device: "this CPU (avx512_bf16)")
    monkeypatch.setattr(precision, "_seconds", lambda hf, ids: 1.0 if hf.dtype == torch.float32 else 0.5)


def test_bfloat16_where_it_is_quick_and_holds(able, checkpoint):
    model = load_model(checkpoint("llama"), dtype="fast", device="cpu")
    plain = load_model(checkpoint("llama"), dtype="bfloat16", device="cpu")
    assert model.hf.dtype == torch.bfloat16 and model.precision.startswith(
        "bfloat16, because this CPU (avx512_bf16) computes in it 2.0"
    )
    row = model.render("Buy the laptop")
    assert torch.equal(model.next_token_logits([row]), plain.next_token_logits([row]))  # as if loaded so
    assert model.fingerprint == plain.fingerprint
    assert plain.precision == ""


def test_float32_where_it_is_not_quick(monkeypatch, checkpoint):
    monkeypatch.setattr(precision, "_bfloat16_on", lambda device: "")
    model = load_model(checkpoint("llama"), dtype="fast", device="cpu")
    assert model.hf.dtype == torch.float32
    assert model.precision == "float32, because this CPU has no bfloat16 instructions"


def test_float32_where_it_is_quicker_in_fact(able, monkeypatch, checkpoint):
    """A processor that has the instructions and is slower with them."""
    monkeypatch.setattr(precision, "_seconds", lambda hf, ids: 1.0 if hf.dtype == torch.float32 else 1.5)
    model, plain = load_model(checkpoint("llama"), dtype="fast", device="cpu"), load_model(checkpoint("llama"))
    assert model.precision == "float32, because bfloat16 takes 1.5 times as long here"
    assert model.hf.dtype == torch.float32 and model.fingerprint == plain.fingerprint


def test_a_pass_takes_time(checkpoint):
    model = load_model(checkpoint("llama"), device="cpu")
    assert 0 < precision._seconds(model.hf, torch.tensor([[1, 2, 3]])) < 10


def test_float32_where_predictions_do_not_stay(able, checkpoint, tmp_path):
    folder = tmp_path / "sharp"
    folder.mkdir()
    for file in checkpoint("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1000  # certain of every token: rounding decides which
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, plain = load_model(folder, dtype="fast", device="cpu"), load_model(folder, device="cpu")
    assert model.precision.startswith("float32, because bfloat16 moves ") and model.hf.dtype == torch.float32
    assert model.fingerprint == plain.fingerprint  # nothing of the trial is left


def test_what_this_processor_says_is_asked(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert precision._bfloat16_on(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision._bfloat16_on(torch.device("cpu")) == "this CPU (avx512_bf16)"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert precision._bfloat16_on(torch.device("cpu")) == "this CPU (avx512_bf16)"


def test_fast_is_not_for_several_devices(checkpoint):
    with pytest.raises(UserError, match=r"dtype 'fast'.*give bfloat16"):
        load_model(checkpoint("llama"), dtype="fast", device="sharded")
    with pytest.raises(UserError, match="dtype 'quick': unknown; use one of auto, fast, float32"):
        load_model(checkpoint("llama"), dtype="quick")
