"""Where the parts of a transformer are, as data: one row per naming scheme, checked at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.errors import UserError


@dataclass(frozen=True)
class Family:
    """Module paths: ``blocks``, ``embed``, ``norm`` (the final one) from the model; the others from a block.

    ``attention_out`` and ``mlp_out`` are the modules whose outputs are added to the residual stream (before a
    post-norm, where the family has one); several names are alternatives, the first that exists is meant.
    ``base`` is the module whose forward pass sees ids, mask and cache; by default the first part of ``blocks``.
    """

    name: str
    blocks: str
    embed: str
    norm: str
    attention_out: tuple[str, ...]
    mlp_out: tuple[str, ...]
    base: str = ""


_LLAMA_PARTS = ("self_attn", "linear_attn", "mixer"), ("mlp", "block_sparse_moe", "feed_forward", "moe")

# More specific layouts first: a vision-language model also has blocks in its vision tower.
FAMILIES = (
    Family(
        "vlm",
        "model.language_model.layers",
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        *_LLAMA_PARTS,
    ),
    Family(
        "vlm-wrapped",
        "language_model.model.layers",
        "language_model.model.embed_tokens",
        "language_model.model.norm",
        *_LLAMA_PARTS,
    ),
    # Llama, Mistral, Mixtral, Qwen 2/3 (and MoE), Gemma 1-3, Phi-3, OLMo, GLM, Cohere, DeepSeek, Granite, …
    Family("llama", "model.layers", "model.embed_tokens", "model.norm", *_LLAMA_PARTS),
    Family("phi", "model.layers", "model.embed_tokens", "model.final_layernorm", ("self_attn",), ("mlp",)),
    Family("gpt2", "transformer.h", "transformer.wte", "transformer.ln_f", ("attn",), ("mlp",)),
    Family(
        "falcon",
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        ("self_attention",),
        ("mlp",),
    ),
    Family(
        "gpt-neox",
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        ("attention",),
        ("mlp",),
    ),
    Family("mpt", "transformer.blocks", "transformer.wte", "transformer.norm_f", ("attn",), ("ffn",)),
    Family(
        "opt",
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        ("self_attn",),
        ("fc2",),
        base="model.decoder",
    ),
)


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    for name in path.split("."):
        if not isinstance(root, nn.Module) or not hasattr(root, name):
            return None
        root = getattr(root, name)
    return root if isinstance(root, nn.Module) else None


def resolve_family(hf: nn.Module, blocks: str | None = None) -> Family:
    """The layout of a loaded model; ``blocks`` names the list of blocks of an architecture not in the table.

    Raises:
        UserError: no layout fits; the message lists the candidates found and the argument to pass.
    """
    known = [f for f in FAMILIES if all(find_module(hf, path) for path in (f.blocks, f.embed, f.norm))]
    if blocks is None and known:
        return known[0]
    if blocks is not None and isinstance(find_module(hf, blocks), nn.ModuleList):
        fitting = [f for f in known if f.blocks == blocks]
        return fitting[0] if fitting else Family("custom", blocks, "", "", *_LLAMA_PARTS)
    lists = [
        f"{name} ({len(m)} x {type(m[0]).__name__})"
        for name, m in hf.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    where = f"no list of blocks at blocks={blocks!r}" if blocks else "unknown architecture"
    raise UserError(
        f"{type(hf).__name__}: {where}; pass the path of its decoder blocks as blocks=…, "
        f"lists of modules found: {', '.join(lists[:8]) or 'none'}"
    )


def text_config(hf: Any) -> Any:
    """The configuration of the text decoder (the model's own, or its text tower's)."""
    return hf.config.get_text_config(decoder=True)


def check_layout(hf: Any, family: Family) -> tuple[list[nn.Module], int]:
    """The blocks and d_model, compared with the configuration.

    Raises:
        UserError: the number of blocks or the width is not what the configuration says.
    """
    found = find_module(hf, family.blocks)
    blocks = list(found) if isinstance(found, nn.ModuleList) else []
    config = text_config(hf)
    if len(blocks) != config.num_hidden_layers:
        raise UserError(
            f"{type(hf).__name__}: {len(blocks)} blocks at {family.blocks} but the configuration says "
            f"{config.num_hidden_layers}; pass the right path as blocks=…"
        )
    embed = find_module(hf, family.embed) if family.embed else None
    width = getattr(getattr(embed, "weight", None), "shape", (0, config.hidden_size))[1]
    # OPT and a few others project narrower embeddings up: the residual stream has the configured width then.
    if width != config.hidden_size and getattr(config, "word_embed_proj_dim", None) != width:
        raise UserError(
            f"{type(hf).__name__}: embeddings at {family.embed} are {width} wide but the configuration says "
            f"{config.hidden_size}; pass blocks=… for the text model"
        )
    return blocks, config.hidden_size
