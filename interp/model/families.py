"""Where the parts of a transformer are, as data: one row per naming scheme, checked at load.

An architecture with other names is searched by structure (:mod:`pingscope.interp.model.discovery`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pingscope.interp.errors import UserError
from pingscope.interp.model.discovery import depths, find_blocks, find_embedding, text_config


@dataclass(frozen=True)
class Family:
    """Paths from the model: its list of blocks, its token embedding, the norm between last block and head.

    ``base`` is the module whose forward pass sees ids, mask and cache; by default the outermost one around the
    blocks that takes ids. No ``norm`` is known of a layout that was found by its structure.
    """

    name: str
    blocks: str
    embed: str
    norm: str
    base: str = ""


@dataclass(frozen=True)
class BlockLayout:
    """Paths inside a block.

    ``projection`` maps the attention heads, side by side, to d_model. ``attn_out`` and ``mlp_out`` are the modules
    whose outputs are *added to the residual stream*: the attention and the MLP themselves unless a norm follows
    them.
    """

    name: str
    attention: str
    projection: str
    mlp: str
    attn_out: str = ""
    mlp_out: str = ""

    @property
    def paths(self) -> dict[str, str]:
        """Part → path inside a block."""
        return {
            "attention": self.attention,
            "projection": self.projection,
            "mlp": self.mlp,
            "attn_out": self.attn_out or self.attention,
            "mlp_out": self.mlp_out or self.mlp,
        }


# More specific layouts first: a vision-language model also has blocks in its vision tower.
FAMILIES = (
    # Gemma 3, LLaVA, Qwen2-VL and later, Mistral 3, … : the text tower of a vision-language model
    Family("vlm", *(f"model.language_model.{part}" for part in ("layers", "embed_tokens", "norm"))),
    Family("vlm-wrapped", *(f"language_model.model.{part}" for part in ("layers", "embed_tokens", "norm"))),
    # Llama, Mistral, Mixtral, Qwen 2/3 (and MoE), Gemma 1-3, Phi-3, OLMo, GLM, Cohere, DeepSeek, Granite, …
    Family("llama", "model.layers", "model.embed_tokens", "model.norm"),
    Family("phi", "model.layers", "model.embed_tokens", "model.final_layernorm"),
    Family("gpt2", "transformer.h", "transformer.wte", "transformer.ln_f"),
    Family("falcon", "transformer.h", "transformer.word_embeddings", "transformer.ln_f"),
    Family("gpt-neox", "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    Family("mpt", "transformer.blocks", "transformer.wte", "transformer.norm_f"),
    Family(
        "opt",
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        base="model.decoder",  # the head calls it past the module around it
    ),
)

# The first whose modules all exist is meant. Norms that follow a part come first: Llama's
# ``post_attention_layernorm`` is the norm before its MLP, Gemma 2's the one after its attention.
BLOCK_LAYOUTS = (
    BlockLayout("glm4", "self_attn", "self_attn.o_proj", "mlp", "post_self_attn_layernorm", "post_mlp_layernorm"),
    BlockLayout(  # Gemma 2/3, OLMo 2/3
        "post-norm", "self_attn", "self_attn.o_proj", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"
    ),
    BlockLayout("llama", "self_attn", "self_attn.o_proj", "mlp"),
    BlockLayout("mixtral", "self_attn", "self_attn.o_proj", "block_sparse_moe"),
    BlockLayout("llama4", "self_attn", "self_attn.o_proj", "feed_forward"),
    BlockLayout("phi", "self_attn", "self_attn.dense", "mlp"),
    BlockLayout("gpt2", "attn", "attn.c_proj", "mlp"),
    BlockLayout("gptj", "attn", "attn.out_proj", "mlp"),
    BlockLayout("mpt", "attn", "attn.out_proj", "ffn"),
    BlockLayout("gpt-neox", "attention", "attention.dense", "mlp"),
    BlockLayout("falcon", "self_attention", "self_attention.dense", "mlp"),
    BlockLayout("opt", "self_attn", "self_attn.out_proj", "fc2"),
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
    path = find_blocks(hf) if blocks is None else blocks
    if isinstance(find_module(hf, path), nn.ModuleList):
        fitting = [f for f in known if f.blocks == path]
        return fitting[0] if fitting else Family("custom", path, find_embedding(hf), "")
    lists = [
        f"{name} ({len(m)} x {type(m[0]).__name__})"
        for name, m in hf.named_modules()
        if isinstance(m, nn.ModuleList) and len(m)
    ]
    where = f"no list of blocks at blocks={blocks!r}" if blocks else "unknown architecture"
    raise UserError(
        f"{type(hf).__name__}: {where}; pass the path of its decoder blocks as --blocks (blocks=…), "
        f"lists of modules found: {', '.join(lists[:8]) or 'none'}"
    )


def block_parts(block: nn.Module) -> dict[str, nn.Module] | None:
    """The parts of one block by their names in :class:`BlockLayout`, or None for a layout not in the table."""
    for layout in BLOCK_LAYOUTS:
        found = {part: find_module(block, path) for part, path in layout.paths.items()}
        if all(found.values()):
            return {part: module for part, module in found.items() if module is not None}
    return None


@dataclass(frozen=True)
class Heads:
    """Attention heads of one layer: how many, how wide each, and how wide its keys are (as its values)."""

    count: int
    size: int
    kv_width: int


def layer_heads(hf: Any, n_layers: int, width: int) -> tuple[Heads, ...]:
    """The heads of every layer. Some families' layers differ (Gemma 4's head size); others have none (state spaces)."""
    config = text_config(hf)
    # Such a configuration refuses to name one value for all layers, and has one configuration a layer instead.
    differ = getattr(config, "is_heterogeneous", False)
    return tuple(_heads(config.per_layer_config[i] if differ else config, i, width) for i in range(n_layers))


def _heads(config: Any, layer: int, width: int) -> Heads:
    def number(name: str) -> int:
        value = getattr(config, name, None) or 0
        return int(value[layer] if isinstance(value, list | tuple) else value)

    count = number("num_attention_heads")
    size = number("head_dim") or (width // count if count else 0)
    return Heads(count, size, (number("num_key_value_heads") or count) * size)


def check_layout(hf: Any, family: Family) -> tuple[list[nn.Module], int]:
    """The blocks and d_model, compared with the configuration.

    Raises:
        UserError: the number of blocks or the width is not what the configuration says.
    """
    found = find_module(hf, family.blocks)
    blocks = list(found) if isinstance(found, nn.ModuleList) else []
    config = text_config(hf)
    if len(blocks) not in depths(config):
        raise UserError(
            f"{type(hf).__name__}: {len(blocks)} blocks at {family.blocks} but the configuration says "
            f"{config.num_hidden_layers}; pass the right path as --blocks (blocks=…)"
        )
    embed = find_module(hf, family.embed) if family.embed and family.name != "custom" else None
    width = getattr(getattr(embed, "weight", None), "shape", (0, config.hidden_size))[1]
    # OPT and a few others project narrower embeddings up: the residual stream has the configured width then.
    if width != config.hidden_size and getattr(config, "word_embed_proj_dim", None) != width:
        raise UserError(
            f"{type(hf).__name__}: embeddings at {family.embed} are {width} wide but the configuration says "
            f"{config.hidden_size}; pass --blocks (blocks=…) for the text model"
        )
    return blocks, config.hidden_size
