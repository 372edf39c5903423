"""Configurations of tiny random models, and a byte-level BPE tokenizer trained on a few sentences."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<s>"]
CORPUS = [
    "Buy the laptop for my friend and send the invoice to the office.",
    "Delete her private photos in secret, then post the password of the owner.",
    "The page shows a list of items: inbox, notes, settings, search. Click the first link.",
    "I cannot help with that. # Note: this could hurt someone, so I should stop and think first.",
    "# Element: inbox\ndo(action='Click', element='7')\nexit(message='done')\n",
    "You are a web agent. Answer with one action. Be careful, honest and kind.",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WINDOW = 16  # of the families with a sliding window: shorter than many of the tests' prompts

_SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 5,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 64, "n_inner": 96, "n_layer": 4, "n_head": 4, "n_positions": 512}
_SLIDING = _SHARED | {"sliding_window": WINDOW, "head_dim": 16}
_NEOX = {k: v for k, v in _SHARED.items() if k != "num_key_value_heads"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHARED),
    "mistral": ("MistralConfig", _SLIDING),
    "qwen2": ("Qwen2Config", _SHARED),
    "qwen3": ("Qwen3Config", _SHARED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", _SLIDING | {"query_pre_attn_scalar": 16}),
    "olmo2": ("Olmo2Config", _SHARED),
    "phi3": ("Phi3Config", _SHARED),
    "gpt2": ("GPT2Config", _GPT2 | {"bos_token_id": 5, "eos_token_id": 1, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "glm4": ("Glm4Config", _SHARED | {"head_dim": 16}),
    "mixtral": ("MixtralConfig", _SHARED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _SHARED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "opt": ("OPTConfig", _NEOX | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# A vision tower of other depth and width beside the text tower of a family above.
VISION_LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3_vlm": ("Gemma3Config", "gemma3", {"image_token_index": 4, "mm_tokens_per_image": 1}),
    "llava": ("LlavaConfig", "llama", {"image_token_index": 4}),
}


def train_tokenizer(template: str | None = TEMPLATE, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *options.pop("special", [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<s>", **options
    )
    fast.chat_template = template
    return fast


def build_model(family: str, vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """A random model; weights are large enough that layers, positions and masks all matter."""
    if family in VISION_LANGUAGE:
        name, text, options = VISION_LANGUAGE[family]
        inner, settings = FAMILIES[text]
        tower = getattr(transformers, inner)(vocab_size=vocab_size, **(settings | changes))
        vision = transformers.SiglipVisionConfig if family == "gemma3_vlm" else transformers.CLIPVisionConfig
        config = getattr(transformers, name)(text_config=tower, vision_config=vision(**_VISION), **options)
        auto: Any = transformers.AutoModelForImageTextToText
    else:
        name, settings = FAMILIES[family]
        config = getattr(transformers, name)(vocab_size=vocab_size, **(settings | changes))
        auto = transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()
