"""GGUF files: read as they are, or refused in one line that says why."""

from __future__ import annotations

import pytest
import torch
from tiny_gguf import write_gguf

from pingscope.interp import UserError, load_model
from pingscope.interp.gguf import read_header
from pingscope.interp.memory import available, weight_bytes

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tiny_model, tmp_path):
    """The tiny Llama in float32."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model.hf, tiny_model.tokenizer)
    return tmp_path / "tiny.gguf"


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as error:
        load_model(source, **options)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(source))
    return message


def test_files_and_folders_load(tiny_model, file):
    row = tiny_model.render("Buy the laptop")
    for source in (file, file.parent, f"{file.parent}:{file.name}"):
        model = load_model(source, device="cpu")
        assert torch.allclose(model.next_token_logits([row]), tiny_model.next_token_logits([row]), atol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_matrices_are_undone(tiny_model, tmp_path, kind, capfd):
    quantised = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "q.gguf", tiny_model.hf, tiny_model.tokenizer, quantised=quantised)
    model = load_model(tmp_path / "q.gguf", dtype="float32")
    weight = tiny_model.hf.model.layers[1].mlp.up_proj.weight.detach().numpy()
    wanted = gguf.dequantize(gguf.quantize(weight, quantised), quantised)
    assert torch.equal(model.hf.model.layers[1].mlp.up_proj.weight, torch.from_numpy(wanted))
    assert "quantizing" not in capfd.readouterr().err  # no bar of the library's


def test_what_was_undone_is_an_ordinary_model(file, checkpoint, tmp_path, monkeypatch):
    model = load_model(file)
    assert not model.hf.is_quantized and not hasattr(model.hf.config, "quantization_config")
    model.hf.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert all(torch.equal(tensor, model.hf.state_dict()[key]) for key, tensor in saved.hf.state_dict().items())
    monkeypatch.setattr("pingscope.interp.precision._bfloat16_on", lambda device: "this CPU")
    monkeypatch.setattr("pingscope.interp.precision._seconds", lambda hf, ids: 0.5 + (hf.dtype == torch.float32))
    assert load_model(file, dtype="fast").hf.dtype == torch.bfloat16


def test_the_header_says_what_the_file_holds(tiny_model, file):
    header = read_header(file)
    assert header.architecture == "llama" and header.settings["llama.block_count"] == 4
    assert header.parameters == sum(p.numel() for p in tiny_model.hf.parameters())
    assert header.settings["tokenizer.ggml.tokens"] == len(tiny_model.tokenizer)


def test_digits_are_split_off_where_the_file_says_so(tiny_model, tmp_path):
    text = "to   12 items"
    for pre, blanks in (("smollm", 3), ("default", 2)):  # otherwise one blank belongs to the number
        write_gguf(tmp_path / f"{pre}.gguf", tiny_model.hf, tiny_model.tokenizer, pre=pre)
        pieces = load_model(tmp_path / f"{pre}.gguf").tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert pieces[1][0] == "Ġ" * blanks
        assert (pieces[2][0] == "1") == (pre == "smollm")


@pytest.mark.parametrize("length", [4, 20, 200, 5_000])
def test_a_header_that_is_cut_off(file, length):
    file.write_bytes(file.read_bytes()[:length])
    assert "cannot load" in refusal(file) and "download it again" in refusal(file)


def test_data_that_is_cut_off_or_no_gguf(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert "is cut off" in refusal(file) and "download it again" in refusal(file)
    file.write_bytes(b"PK" + whole[2:])
    assert "is no GGUF" in refusal(file)
    file.write_bytes(b"")
    assert "cannot load" in refusal(file)
    file.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    assert "GGUF version 1" in refusal(file)


def test_an_architecture_that_transformers_does_not_know(tiny_model, tmp_path):
    write_gguf(tmp_path / "odd.gguf", tiny_model.hf, tiny_model.tokenizer, architecture="hornets")
    message = refusal(tmp_path / "odd.gguf")
    assert "architecture 'hornets'" in message and "safetensors folder" in message


@pytest.mark.parametrize(("kind", "called"), [(15, "Q8_K"), (24, "I8"), (99, "type 99")])
def test_a_type_that_cannot_be_undone(file, kind, called):
    raw = bytearray(file.read_bytes())
    name = b"blk.2.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 2 * 8  # the name, how many dimensions, and the two of them
    raw[place : place + 4] = kind.to_bytes(4, "little")
    file.write_bytes(raw)
    message = refusal(file)
    assert f"blk.2.ffn_up.weight is stored as {called}" in message and "Q8_0" in message


def test_files_of_a_hub_id_or_a_folder(file):
    assert "GGUF files there: tiny.gguf" in refusal(f"{file.parent}:other.gguf")
    assert "neither a folder nor a hub id" in refusal("./nowhere:other.gguf")
    message = refusal("nobody/nothing:model.Q8_0.gguf")  # no network in tests
    assert "cannot get the file from the hub" in message and "give a local one" in message


def test_a_file_of_the_hub(file, tiny_model, monkeypatch):
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = load_model("owner/name:tiny.gguf", revision="v2")
    assert asked == [("owner/name", "tiny.gguf", "v2")] and model.name == "owner/name:tiny.gguf"
    row = model.render("Buy the laptop")
    assert torch.allclose(model.next_token_logits([row]), tiny_model.next_token_logits([row]), atol=1e-4)


def test_memory_is_asked_for_first(file, checkpoint, monkeypatch):
    monkeypatch.setattr("pingscope.interp.memory.available", lambda: 100_000)
    for source in (file, checkpoint("llama")):
        message = refusal(source)
        assert "GB of memory are free" in message and "--dtype bfloat16" in message
    monkeypatch.setattr("pingscope.interp.memory.available", lambda: 0)  # not known: not refused
    assert load_model(file).n_layers == 4


def test_what_weights_take(file, checkpoint, tiny_model, tmp_path):
    numbers = sum(p.numel() for p in tiny_model.hf.parameters())
    assert weight_bytes(checkpoint("llama"), "", "auto") == 4 * numbers
    assert weight_bytes(checkpoint("llama"), "", "bfloat16") == 2 * numbers
    assert weight_bytes(file.parent, file.name, "auto") == 8 * numbers  # undone beside the model
    assert weight_bytes(tmp_path / "nowhere", "", "auto") == 0


def test_free_memory_within_a_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  2000 kB\n")
    assert available(tmp_path) == 2000 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available(tmp_path) == 2000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1500000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("900000\n")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 500000\ninactive_file 300000\nactive_file 100000\n")
    assert available(tmp_path) == 1_000_000  # files that were read can be let go
    assert available(tmp_path / "nowhere") > 10**8  # elsewhere: what the machine has
