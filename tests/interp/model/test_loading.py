"""Nothing silently wrong at load: weights, files and folders that are refused, by name, and those that load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model, train_tokenizer

from pingscope.interp import Prompt, UserError, load_model
from pingscope.interp.generate.generation import generate
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.interp.model.adapters import write_base

UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tiny Llama to damage."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "damaged")


def rewrite(folder, change):
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def settings(folder, **changes):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | changes))


def refusal(folder, **options) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, **options)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder))
    return message


def test_missing_weights_are_refused_by_name(folder, capfd):
    rewrite(folder, lambda t: t.pop(UP))
    assert f"the file lacks {UP}, which would be filled at random" in refusal(folder)
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "lacks lm_head.weight, " + UP in refusal(folder)
    assert "REPORT" not in capfd.readouterr().err


def test_a_layer_more_in_the_configuration_or_in_the_file(folder):
    settings(folder, num_hidden_layers=5, layer_types=None)
    assert "lacks model.layers.4.input_layernorm.weight" in refusal(folder)
    settings(folder, num_hidden_layers=3, layer_types=None)
    message = refusal(folder)
    assert "holds model.layers.3." in message and "6 more tensors" in message and "config.json" in message


def test_tensors_that_older_versions_saved_are_harmless(folder, checkpoint, tmp_path):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load_model(folder).n_layers == 4
    old = shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2")
    rewrite(old, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    assert load_model(old).n_layers == 4
    rewrite(folder, lambda t: t.update({"v_head.summary.weight": torch.ones(1, 64)}))
    assert "holds v_head.summary.weight" in refusal(folder)


def test_other_shapes_are_refused_by_name(folder):
    settings(folder, intermediate_size=80)
    message = refusal(folder)
    assert "mlp.down_proj.weight" in message and "(64, 96) in the file, but (64, 80)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    rewrite(folder, lambda t: t["model.norm.weight"].__setitem__(3, value))
    assert "model.norm.weight holds NaN or infinity" in refusal(folder)


def test_matrices_of_zeros(folder, checkpoint, tmp_path):
    rewrite(folder, lambda t: t[UP].zero_())
    assert f"{UP} is all zero" in refusal(folder)
    biased = shutil.copytree(checkpoint("qwen2"), tmp_path / "biased")
    rewrite(biased, lambda t: [x.zero_() for key, x in t.items() if key.endswith("bias")])
    assert load_model(biased).n_layers == 4


def test_tied_embeddings_are_not_missing(tmp_path):
    tokenizer = train_tokenizer()
    build_model("llama", len(tokenizer) + 40, tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype="bfloat16")
    assert model.vocab_size == len(tokenizer) + 40
    assert model.next_token_logits([model.render("Buy")]).isfinite().all()


def test_damaged_files(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for raw in (whole[:-1000], whole[:5], b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(raw)
        assert "model.safetensors: damaged safetensors" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_an_index_of_shards_that_are_not_all_there(checkpoint, tmp_path):
    folder = tmp_path / "sharded"
    hf = build_model("llama", len(train_tokenizer()))
    hf.save_pretrained(folder, max_shard_size="200KB")
    train_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and load_model(folder).n_layers == 4
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model.norm.weight", "model.norma.weight"))
    assert "lacks the tensor model.norma.weight" in refusal(folder)
    index.write_text(json.dumps({"weight_map": 3}))
    assert "weight_map" in refusal(folder)
    index.write_text(text)
    shards[1].unlink()
    assert f"names {shards[1].name}, which is not there" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "nonsense"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}],
)
def test_configurations_that_make_no_sense(folder, change):
    settings(folder, **change)
    refusal(folder)


def test_folders_that_hold_a_model_deeper_or_are_files(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "outer" / "inner")
    assert f"did you mean {tmp_path / 'outer' / 'inner'}?" in refusal(tmp_path / "outer")
    assert "a file; give the model's folder" in refusal(checkpoint("llama") / "model.safetensors")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A LoRA adapter that changes the tiny Llama visibly."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    hf = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    tuned = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    return folder, tuned


def test_an_adapter_is_put_on_its_base(adapter, checkpoint, tiny_model):
    folder, tuned = adapter
    model = load_model(folder)
    row = model.render("Buy the laptop")
    with torch.no_grad():
        wanted = tuned(torch.tensor([row.ids])).logits[0, -1]
    assert torch.allclose(model.next_token_logits([row])[0], wanted, atol=1e-4)
    assert model.name == f"{folder} on {checkpoint('llama')}"
    assert model.fingerprint != tiny_model.fingerprint and not model.parts_problem
    assert load_model(folder, base=checkpoint("llama")).fingerprint == model.fingerprint


def test_an_adapter_whose_weights_change_is_another_model(adapter, checkpoint, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    before = load_model(folder, base=checkpoint("llama"), device="cpu").fingerprint
    assert load_model(folder, base=checkpoint("llama"), device="cpu").fingerprint == before
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, file, {"format": "pt"})
    assert load_model(folder, base=checkpoint("llama"), device="cpu").fingerprint != before


def test_adapters_that_do_not_fit(adapter, checkpoint, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    assert "does not fit this base" in refusal(folder, base=checkpoint("gpt2"))
    assert "no adapter" in refusal(checkpoint("llama"), base=checkpoint("llama"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(UserError, match=f"lacks {key}"):
        load_model(folder)
    save_file({k: v * float("nan") for k, v in tensors.items()}, file)
    assert "holds NaN" in refusal(folder)
    found = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(found | {"base_model_name_or_path": "/nowhere/base"}))
    assert "/nowhere/base, which does not load" in refusal(folder) and "base=" in refusal(folder)


def test_an_adapter_knows_the_weights_it_was_trained_on(adapter, checkpoint, tmp_path):
    base, folder = checkpoint("llama"), shutil.copytree(adapter[0], tmp_path / "adapter")
    write_base(folder, base)
    assert load_model(folder).fingerprint == load_model(adapter[0]).fingerprint
    assert load_model(folder, dtype="bfloat16").n_layers == 4  # the files are compared, whatever they are read as
    twin = shutil.copytree(base, tmp_path / "twin")
    assert load_model(folder, base=twin).n_layers == 4
    rewrite(twin, lambda t: t[UP].mul_(1.001))  # the same shapes
    assert load_model(adapter[0], base=twin).n_layers == 4  # an adapter that says nothing
    message = refusal(folder, base=twin)
    assert f"was trained on {base.name}" in message and "holds other weights; pass that one as --base" in message
    (folder / "base.json").write_text("3")
    assert "holds other weights" in refusal(folder)


def test_an_adapter_beside_a_model_is_not_guessed_at(adapter, folder):
    (folder / "adapter_config.json").write_bytes((adapter[0] / "adapter_config.json").read_bytes())
    shutil.copy(adapter[0] / "adapter_model.safetensors", folder)
    assert "holds a model (model.safetensors) and an adapter" in refusal(folder)
    (folder / "model.safetensors").unlink()  # some trainers leave the base's config.json beside their adapter
    assert load_model(folder).fingerprint == load_model(adapter[0]).fingerprint


def test_gguf_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model-q8.gguf").write_bytes(b"GGUF")
    assert "pip install gguf" in refusal(tmp_path / "model-q8.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert "2 GGUF files" in refusal(tmp_path)


def overflowing(folder):
    """Finite weights whose logits are infinite: a checkpoint that overflowed."""
    rewrite(folder, lambda t: t["lm_head.weight"].div_(t["lm_head.weight"].abs().max()).mul_(3e38))
    return load_model(folder)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"use_cache": False}, {"prefill_chunk": 4}])
def test_a_head_without_meaning_is_stopped(folder, options):
    model = overflowing(folder)
    row = model.render(Prompt("first", "Buy the laptop"))
    with pytest.raises(UserError, match=r"'first'.*logits that are NaN or infinite"):
        generate(model, [row], max_new_tokens=4, **options)
    with pytest.raises(UserError, match=r"'first'.*logits that are NaN or infinite"):
        model.next_token_logits([row])
    with pytest.raises(UserError, match=r"'first'.*logits that are NaN or infinite"):
        generate(model, [row], max_new_tokens=4, said=[(9, 8)])
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        SharedPrefill(model).generate([row], max_new_tokens=4)


def test_activations_without_meaning_are_stopped(folder):
    model = load_model(folder)
    rows = [model.render(Prompt(name, text)) for name, text in (("first", "Buy"), ("second", "Delete @ it"))]
    odd = next(i for i in rows[1].ids if i not in rows[0].ids)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[odd] = float("nan")
    assert model.residuals(rows[:1], "all")[3][0].isfinite().all()
    with pytest.raises(UserError, match=r"'second'.*activations that are NaN or infinite"):
        model.residuals(rows, "all")


def test_a_model_that_overflows_on_two_tokens_is_refused(folder):
    rewrite(folder, lambda t: t[UP].div_(t[UP].abs().max()).mul_(3e38))
    assert "after layer 2" in refusal(folder)
