"""Tiny random checkpoints of many families: saved, loaded, and equal to plain runs where their layers differ."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import FAMILIES, build_model, train_tokenizer
from tiny_types import tiny_config

from pingscope.interp import HookedModel, UserError, load_model
from pingscope.interp.backends.parity import run_parity

TYPES = (
    *(
        "apertus",
        "biogpt",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "ctrl",
        "deepseek_v3",
        "exaone4",
        "falcon",
        "gemma",
    ),
    *("glm", "gpt_bigcode", "gpt_oss", "gptj", "granite", "helium", "lfm2", "modernbert-decoder", "mpt", "nemotron"),
    *("nemotron_h", "olmo", "olmo3", "olmoe", "phi", "qwen3_next", "seed_oss", "smollm3", "starcoder2", "xglm"),
)


def save(config, folder):
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_checkpoint_loads_as_it_was(kind, tmp_path):
    """No false refusal of weights; the stream found is what plain Hugging Face runs give."""
    hf = save(tiny_config(kind, len(train_tokenizer())), tmp_path)
    model = load_model(tmp_path)
    row = model.render("Buy the laptop")
    with torch.no_grad():
        plain = hf(torch.tensor([row.ids]), output_hidden_states=True)
    assert torch.allclose(model.next_token_logits([row])[0], plain.logits[0, -1], atol=1e-4)
    found = model.residuals([row], "embed,all")
    for layer, x in zip((-1, 0, 1, 2), plain.hidden_states, strict=False):
        assert torch.allclose(found[layer][0], x[0], atol=1e-4), layer


def test_layers_of_other_head_sizes_are_known_by_layer(tmp_path):
    """Gemma 4: its configuration refuses to name one head size for all layers."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 32}
    width = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    n = len(train_tokenizer())
    settings = FAMILIES["gemma3"][1] | layers | width | {"vocab_size_per_layer_input": n}
    save(transformers.Gemma4TextConfig(vocab_size=n, **settings), tmp_path)
    model = load_model(tmp_path)
    assert [one.size for one in model.heads] == [16, 32, 16, 32]
    assert [one.kv_width for one in model.heads] == [32, 64, 32, 64]
    assert all(check.ok for check in run_parity(model, new_tokens=3))


@pytest.mark.parametrize(("kind", "changes", "why"), [
    ("bert", {"is_decoder": False}, "depends on later tokens.*is_decoder: true"),
    ("xlm", {}, r"pass the path of its decoder blocks as --blocks.*transformer\.ffns"),
])  # fmt: skip
def test_an_architecture_that_cannot_be_read_is_refused_in_one_line(kind, changes, why, tmp_path):
    config = tiny_config(kind, len(train_tokenizer()))
    for name, value in changes.items():
        setattr(config, name, value)
    save(config, tmp_path)
    with pytest.raises(UserError, match=why) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


class Wrapper(transformers.PreTrainedModel):
    """As some remote code is written: its own pass wants an image, and a language model is inside."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, inner):
        super().__init__(inner.config)
        self.language_model = inner

    def forward(self, pixel_values, input_ids=None, **options):
        raise AssertionError("there is no image")


def test_the_language_model_inside_a_wrapper_that_wants_an_image_is_taken():
    tokenizer = train_tokenizer()
    inner = build_model("llama", len(tokenizer))
    model = HookedModel(Wrapper(inner), tokenizer)
    assert model.hf is inner and model.n_layers == 4
