"""Loading: what is found, what is refused, what identifies a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_models import FAMILIES, TEMPLATE, build_model, train_tokenizer

from interp import HookedModel, Prompt, UserError, load_model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(load, checkpoint, family):
    model = load(family)
    assert (model.n_layers, model.d_model, model.context_length, model.pad_id) == (4, 64, 512, 0)
    assert model.name == str(checkpoint(family)) and model.device.type == "cpu"
    assert model.blocks[0] is not None and model.final_norm is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_vision_language_model_uses_its_text_tower():
    from transformers import AutoModelForImageTextToText, Gemma3Config

    tokenizer = train_tokenizer()
    text = build_model("gemma3", len(tokenizer)).config.to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=4, mm_tokens_per_image=1)
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(config).eval()
    model = HookedModel(hf, tokenizer)
    assert (model.family.name, model.n_layers, model.d_model) == ("vlm", 4, 64)
    rows = [model.render(Prompt(f"p{i}", "Buy the laptop " * (i + 1))) for i in range(3)]
    found = model.residuals(rows, "all")
    with torch.no_grad():
        plain = hf(input_ids=torch.tensor([rows[0].ids]), output_hidden_states=True).hidden_states
    assert torch.allclose(found[1][0], plain[2][0], atol=1e-5)


def test_unknown_architecture_names_what_it_found_and_the_argument():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.transformer_stack = hf.model
    hf.transformer_stack.deep = hf.model.layers
    del hf.transformer_stack.layers
    with pytest.raises(UserError, match=r"blocks=.*deep \(4 x LlamaDecoderLayer\)"):
        HookedModel(hf, tokenizer)
    with pytest.raises(UserError, match=r"no list of blocks at blocks=.model\.lairs."):
        HookedModel(hf, tokenizer, blocks="model.lairs")
    found = HookedModel(hf, tokenizer, blocks="transformer_stack.deep")
    assert found.n_layers == 4


def test_blocks_must_be_what_the_configuration_says():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"4 blocks at model\.layers but the configuration says 3"):
        HookedModel(hf, tokenizer)


def test_fingerprint_follows_weights_and_configuration(checkpoint, tmp_path):
    model = load_model(checkpoint("llama"))
    copy = tmp_path / "copied elsewhere"
    shutil.copytree(checkpoint("llama"), copy)
    first = model.fingerprint
    assert load_model(copy).fingerprint == first and len(first) == 64
    assert load_model(copy, dtype="bfloat16").fingerprint != first
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    assert load_model(copy).fingerprint != first
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert model.fingerprint != first


def test_a_chat_template_can_be_passed(checkpoint, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint("llama"), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="--chat-template"):
        load_model(folder).render("Buy")
    own = load_model(checkpoint("llama")).render("Buy")
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    assert load_model(folder, chat_template=file).render("Buy") == own
    assert load_model(folder, chat_template=TEMPLATE).render("Buy") == own
    with pytest.raises(UserError, match=r"missing\.jinja"):
        load_model(folder, chat_template=tmp_path / "missing.jinja")


def test_folders_that_are_no_models(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./nowhere", "/nowhere/at/all", "runs/base", str(tmp_path / "x")):
        with pytest.raises(UserError, match="no such model folder") as error:
            load_model(name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="nobody/nothing: cannot load") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint("llama"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled: cannot load"):
        load_model(folder)
    with pytest.raises(UserError, match="dtype"):
        load_model(checkpoint("llama"), dtype="int3")
    with pytest.raises(UserError, match="device"):
        load_model(checkpoint("llama"), device="gpu9")
