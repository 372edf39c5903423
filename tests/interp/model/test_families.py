"""Tiny random checkpoints of many families: saved, loaded, and equal to plain runs where their layers differ."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from tiny_models import FAMILIES, train_tokenizer

from pingscope.interp import UserError, load_model
from pingscope.interp.backends.parity import run_parity

# Sizes under every name that configurations give them; a family takes those that it knows.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "sliding_window", "mamba_head_dim"), 16),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "mamba_num_heads": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 1},
}
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
    cls = transformers.CONFIG_MAPPING[kind]
    known = set(inspect.signature(cls.__init__).parameters) - set(cls.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    hf = save(cls(vocab_size=len(train_tokenizer()), **sizes), tmp_path)
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


def test_an_architecture_without_a_stream_is_refused_in_one_line(tmp_path):
    config = transformers.BertConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=96, is_decoder=True)  # fmt: skip
    save(config, tmp_path)
    with pytest.raises(UserError, match=r"blocks=.*bert\.encoder\.layer") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
