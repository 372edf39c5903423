"""What a layer consists of: the modules that write into the residual stream, and the split of attention into heads.

A block adds what its attention and its MLP write, so the stream after layer l is the embedding plus every such write
up to l. Where a family norms a sublayer's output before adding it (Gemma 2 and 3, OLMo 2, GLM 4), the write is what
leaves that norm. The names of those norms mean other things elsewhere: a Llama's ``post_attention_layernorm`` stands
*before* its MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pingscope.interp.errors import UserError
from pingscope.interp.model.contract import Model
from pingscope.interp.model.discovery import text_config
from pingscope.interp.model.selection import EMBED

Part = Literal["residual", "attention", "heads", "mlp"]

MODULES: dict[Part, tuple[str, Literal["input", "output"]]] = {
    "attention": ("attn_out", "output"),
    "heads": ("projection", "input"),
    "mlp": ("mlp_out", "output"),
}


def module_of(model: Model, layer: int, part: Part) -> tuple[nn.Module, Literal["input", "output"]]:
    """The module that carries a part of a layer, and on which side of it the part is.

    Raises:
        UserError: the layer has no such part, or the architecture does not name it.
    """
    if layer == EMBED or part == "residual":
        raise UserError(f"the {part} of layer {layer} is in no module; use a part of layers 0-{model.n_layers - 1}")
    name, side = MODULES[part]
    return model.part(layer, name), side


@dataclass(frozen=True)
class HeadSplit:
    """How attention's write comes from its heads: ``scale * gain * (weight @ heads + bias)``."""

    weight: Float[Tensor, "d_model head size"]
    bias: Float[Tensor, " d_model"]
    gain: Float[Tensor, " d_model"] | None  # of the post-norm; its scale differs from token to token

    @property
    def n_heads(self) -> int:
        return self.weight.shape[1]


def head_split(model: Model, layer: int) -> HeadSplit:
    """The output projection of a layer, cut into heads; float64, on the model's device.

    Raises:
        UserError: a projection without plain weights, or not a multiple of the heads wide.
    """
    projection, heads = model.part(layer, "projection"), model.heads[layer].count
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise UserError(f"layer {layer}: the output projection has no plain weights; load the model unquantised")
    matrix = weight.detach().double()
    if not isinstance(projection, nn.Linear):  # GPT-2's Conv1D keeps (in, out)
        matrix = matrix.T
    if matrix.shape[0] != model.d_model or not heads or matrix.shape[1] % heads:
        raise UserError(f"layer {layer}: output projection {tuple(matrix.shape)} does not split into {heads} heads")
    bias = getattr(projection, "bias", None)
    norm, gain = _post_norm(model, layer), None
    if norm is not None:
        with torch.no_grad():  # an RMS norm maps ones to its gain, up to a factor that the token's scale absorbs
            gain = norm(torch.ones(model.d_model, dtype=weight.dtype, device=weight.device)).double()
    return HeadSplit(
        matrix.reshape(model.d_model, heads, -1),
        torch.zeros(model.d_model).to(matrix) if bias is None else bias.detach().double(),
        gain,
    )


def write_scale(model: Model) -> float:
    """The factor with which writes enter the stream (Granite); 1 elsewhere."""
    return float(getattr(text_config(model.hf), "residual_multiplier", 1.0))


def _post_norm(model: Model, layer: int) -> nn.Module | None:
    """The norm of what attention writes, where there is one."""
    written = model.part(layer, "attn_out")
    return None if written is model.part(layer, "attention") else written
