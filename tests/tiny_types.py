"""A tiny random model of any type that transformers knows, from its configuration shrunk by field names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, PreTrainedConfig

LAYERS = 4

# Sizes under every name that configurations give them; a type takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "emb_dim"), 64),
    **dict.fromkeys(("encoder_hidden_size", "lru_width", "ple_embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "ffn_hidden_size", "decoder_ffn_dim", "dim_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "sliding_window", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "mamba_num_heads": 8, "index_n_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 1, "is_decoder": True},
    **{"image_size": 28, "patch_size": 14, "mamba_n_heads": 8, "mamba_chunk_size": 16, "chunk_size": 16},
    **{"mamba_d_state": 8, "mamba_d_ssm": 128},
}

_KEYS_SHARED = {"num_kv_shared_layers": 0}
_HYBRID = ["linear_attention", "hybrid"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
# What a type wants besides; of a part of it under the part's name. None leaves a field to its default.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"vision_config": {"pyramid_num_routed": [-1, -1, 4, 4], "adapter_in_dim": 64, "adapter_out_dim": 64},
                   "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": _KEYS_SHARED | {"layer_types": ["sliding_attention", "full_attention"] * 2,
                                    "hidden_size_per_layer_input": 8,
                                    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "mimo_v2_flash": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                                  "indexer_budget": 64, "indexer_compress_ratio": 4}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
                       "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32], "attn_layers": ["local"] * 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: str, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a type, shrunk; raises what transformers raises."""
    return _shrunk(transformers.CONFIG_MAPPING[kind], vocab_size, OWN.get(kind, {}))


def tiny_model(kind: str, vocab_size: int, seed: int = 0) -> Any:
    """A random causal language model of a type; weights are large enough that layers and positions matter."""
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size), dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return hf.eval()


def _shrunk(cls: type[PreTrainedConfig], vocab_size: int, own: dict[str, Any]) -> PreTrainedConfig:
    known = set(inspect.signature(cls.__init__).parameters)
    sizes = SIZES | {"vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size}
    given = {name: value for name, value in sizes.items() if name in known}
    whole = cls()
    for name in whole.sub_configs:
        if isinstance(part := getattr(whole, name, None), PreTrainedConfig):
            given[name] = _shrunk(type(part), vocab_size, own.get(name, {}))
    return cls(**given | {name: value for name, value in own.items() if name not in whole.sub_configs})


_TOWER = "its vision tower needs the package timm; the text model inside, gemma3n_text, works"
_DRAFTS = "drafts tokens for a larger Gemma 4 from that model's keys and values; it reads no text by itself"
_POSITIONS = "counts positions from its padding token's id, while generation in transformers counts them from 0"
_SOUND = "generates codes of sound, several at a time, not text"
# Types whose tiny random model transformers does not build here, and how that fails.
NOT_BUILT = {
    "gemma3n": ImportError,
    "gemma4_assistant": StrictDataclassClassValidationError,
    "gemma4_unified_assistant": ValueError,
    "musicgen": AttributeError,
    "musicgen_melody": AttributeError,
}
# Types that cannot be read, and why.
NO_STREAM = {
    "blt": "reads bytes through four networks of different widths, patch by patch",
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _POSITIONS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), _POSITIONS),
    "cpmant": "puts 32 prompt tokens of its own in front, so its stream is longer than the text",
    "gemma3n": _TOWER,
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "hrm_text": "runs two stacks of blocks again and again for one token",
    "inkling2_text": "its blocks read a mixture of all earlier blocks' outputs instead of one sum",
    "musicgen": _SOUND,
    "musicgen_melody": _SOUND,
    "prophetnet": "computes several future tokens at every position, each in a stream of its own",
    "reformer": "passes on two streams, of which each is recomputed from the other",
    "xlm": "has lists of sublayers, but no modules that are its blocks",
    "xlnet": "sees later tokens unless a permutation is passed in",
    "xlstm": "can be read, but not continued: transformers lays out its state for keys as wide as values",
}
