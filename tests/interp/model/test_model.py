"""Loading: what is found, what is refused, what identifies a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from tiny_models import FAMILIES, TEMPLATE, VISION_LANGUAGE, build_model, train_tokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pingscope.interp import HookedModel, Prompt, UserError, load_model
from pingscope.interp.model.check import distance
from pingscope.interp.model.hooks import on_input, on_output


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(checkpoint, family):
    model = load_model(checkpoint(family), device="cpu")  # a fresh one: nnsight leaves its hooks on those shared
    assert (model.n_layers, model.d_model, model.context_length, model.pad_id) == (4, 64, 512, 0)
    assert model.name == str(checkpoint(family)) and model.device.type == "cpu"
    assert model.blocks[0] is not None and model.final_norm is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_vision_language_model_uses_its_text_tower(load, family):
    model = load(family)
    assert (model.family.name, model.n_layers, model.d_model) == ("vlm", 4, 64)
    rows = [model.render(Prompt(f"p{i}", "Buy the laptop " * (i + 1))) for i in range(3)]
    found = model.residuals(rows, "all")
    with torch.no_grad():
        plain = model.hf(input_ids=torch.tensor([rows[0].ids]), output_hidden_states=True).hidden_states
    assert torch.allclose(found[1][0], plain[2][0], atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *VISION_LANGUAGE])
def test_parts_of_the_blocks_add_up_to_the_stream(load, family):
    """Also on a prompt longer than the two tokens that loading looks at."""
    model = load(family)
    assert not model.parts_problem
    row = model.render("Click the first link, then buy the laptop for my friend.")
    stream, parts = {}, {}
    handles = [model.on_residual(l, lambda x, l=l: stream.__setitem__(l, x)) for l in range(-1, 4)]
    for l in range(4):
        for name in ("attn_out", "mlp_out"):
            key = (l, name)
            handles.append(on_output(model.part(l, name), lambda x, key=key: parts.__setitem__(key, x)))
    with torch.no_grad():
        model.base(**model.inputs(model.batch([row])))
    [handle.remove() for handle in handles]
    total = stream[-1]
    for l in range(4):
        total = total + parts[l, "attn_out"] + parts[l, "mlp_out"].reshape(total.shape)
        assert distance(total, stream[l]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "opt", "mixtral", "glm4"])
def test_heads_side_by_side_enter_the_projection(load, family):
    model = load(family)
    row, seen = model.render("Click the first link."), {}
    projection = model.part(2, "projection")
    handles = [
        on_input(projection, lambda x: seen.__setitem__("heads", x)),
        on_output(model.part(2, "attention"), lambda x: seen.__setitem__("out", x)),
    ]
    with torch.no_grad():
        model.base(**model.inputs(model.batch([row])))
        [handle.remove() for handle in handles]
        heads = seen["heads"].reshape(1, len(row), model.n_heads, model.head_dim)
        bias = projection(torch.zeros_like(seen["heads"]))
        only = [torch.zeros_like(heads).index_copy(2, torch.tensor([h]), heads[:, :, [h]]) for h in range(4)]
        summed = sum(projection(x.flatten(2)) - bias for x in only) + bias
    assert distance(summed.reshape(seen["out"].shape), seen["out"]) < 1e-5


def test_parts_that_do_not_add_up_are_refused():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.model.layers[2].mlp.register_forward_hook(lambda m, a, o: o * 2, prepend=True)
    assert not HookedModel(hf, tokenizer).parts_problem  # the doubled output is what is added
    granite = transformers.GraniteConfig(vocab_size=len(tokenizer), residual_multiplier=0.2, **FAMILIES["llama"][1])
    scaled = HookedModel(transformers.GraniteForCausalLM(granite), tokenizer)
    with pytest.raises(UserError, match="block 0 do not add up"):
        scaled.part(0, "attn_out")
    assert scaled.residuals([scaled.render("Buy")], 3)[3][0].shape[1] == 64
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    with pytest.raises(UserError, match="no part 'heads'"):
        model.part(0, "heads")


def test_blocks_that_are_not_the_decoder_are_refused():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.model.spare = torch.nn.ModuleList(build_model("llama", len(tokenizer)).model.layers)
    with pytest.raises(UserError, match=r"block 0 at model\.spare put out nothing for 8 tokens.*blocks="):
        HookedModel(hf, tokenizer, blocks="model.spare")
    hf.model.layers[2].register_forward_hook(lambda m, a, o: o[..., :32])
    hf.model.layers[3].forward = lambda x, **_: torch.cat([x, x], -1)
    with pytest.raises(UserError, match=r"block 2 at model\.layers put out \(3, 8, 32\)"):
        HookedModel(hf, tokenizer)


def test_a_norm_that_is_not_the_final_one_is_refused():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.model.register_forward_hook(lambda m, a, o: type(o)(last_hidden_state=o.last_hidden_state * 2))
    with pytest.raises(UserError, match=r"final norm at model\.norm.*blocks="):
        HookedModel(hf, tokenizer)


def test_unknown_architecture_names_what_it_found_and_the_argument():
    tokenizer = train_tokenizer()
    hf = build_model("llama", len(tokenizer))
    hf.stack = hf.model
    del hf.model
    hf.spare = torch.nn.ModuleList(hf.stack.layers)  # two lists that could be the blocks
    with pytest.raises(UserError, match=r"blocks=.*stack.layers \(4 x LlamaDecoderLayer\)"):
        HookedModel(hf, tokenizer)
    with pytest.raises(UserError, match=r"no list of blocks at blocks=.model\.lairs."):
        HookedModel(hf, tokenizer, blocks="model.lairs")
    with pytest.raises(UserError, match=r"generation in transformers fails.*read but not answer"):
        HookedModel(hf, tokenizer, blocks="stack.layers")  # its own forward pass looks for what was renamed

    def forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None, **_):
        out = hf.stack(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=hf.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)

    hf.forward = forward
    found = HookedModel(hf, tokenizer, blocks="stack.layers")
    assert found.n_layers == 4 and found.family.name == "custom"


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
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        load_model(folder)
    with pytest.raises(UserError, match="dtype"):
        load_model(checkpoint("llama"), dtype="int3")
    with pytest.raises(UserError, match="device"):
        load_model(checkpoint("llama"), device="gpu9")
