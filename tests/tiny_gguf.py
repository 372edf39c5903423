"""A tiny model as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_gguf(
    path: Path,
    hf: Any,
    tokenizer: Any,
    *,
    quantised: Any = None,
    architecture: str = "llama",
    pre: str = "default",
    eos: int | None = None,
) -> None:
    """A tiny Llama in the format of llama.cpp, with the library that it ships.

    Args:
        quantised: a ``gguf.GGMLQuantizationType`` of the matrices; default: float32.
    """
    import gguf

    config, vocabulary = hf.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10_000.0)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if vocabulary[token] < 6 else 1 for token in tokens])
    if eos is not None:
        writer.add_eos_token_id(eos)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in hf.state_dict().items():
        if key.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp orders rotary pairs otherwise
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            pairs = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        name, numbers = names.get_name(key, try_suffixes=(".weight",)), tensor.float().contiguous().numpy()
        if quantised is None or numbers.ndim < 2:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quantize(numbers, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
