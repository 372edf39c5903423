"""What an edit does to a row of the residual stream. Each operator returns a function (row, d_model) → same shape.

``w`` and ``b`` are a probe's raw-space direction and intercept: w·x + b is the safety logit, positive = harmful. The
last three act only on rows below the boundary and leave the others exactly unchanged, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from interp.errors import UserError
from interp.hooks import Edit
from interp.selection import Selection, final
from steering.directions import Direction

Operator = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]


def add(vector: ArrayLike) -> Operator:
    """x + v."""
    v = torch.as_tensor(np.asarray(vector, np.float32))
    return lambda x: x + v.to(x)


def ablate(vector: ArrayLike) -> Operator:
    """Project ``vector`` out: x - (x·u)u with u its unit vector, computed in float32 or wider."""
    v = torch.as_tensor(np.asarray(vector, np.float64))
    u = (v / _length(v)).float()

    def operator(x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        unit = u.to(wide)
        return (wide - (wide @ unit)[:, None] * unit).to(x.dtype)

    return operator


def set_logit(w: ArrayLike, b: float, target: float) -> Operator:
    """Raise the safety logit to ``target`` where it is below 0, by the least change (StTP)."""
    if target < 0:
        raise UserError(f"set_logit: target {target} lies below the boundary; give 0 or more")
    return _raise(w, b, lambda logit: target - logit)


def to_boundary(w: ArrayLike, b: float, margin: float = 0.0) -> Operator:
    """Raise rows below the boundary onto it; ``margin`` 0.1 goes a tenth of the distance beyond."""
    return _raise(w, b, lambda logit: -(1.0 + margin) * logit)


def mirror(w: ArrayLike, b: float, alpha: float = 1.0) -> Operator:
    """Reflect rows below the boundary to the other side: logit l becomes (1 - 2 alpha) l (StMP)."""
    return _raise(w, b, lambda logit: -2.0 * alpha * logit)


def _raise(w: ArrayLike, b: float, change: Callable[[Tensor], Tensor]) -> Operator:
    direction = torch.as_tensor(np.asarray(w, np.float64))
    step = direction / _length(direction) ** 2  # one unit of logit

    def operator(x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        # The intercept cancels most of w·x, so float64; Apple's GPU has float32 at most.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        wide = x.to(dtype)
        logit = wide @ direction.to(wide) + b
        moved = wide + change(logit)[:, None] * step.to(wide)
        # Selected, not moved by nothing: the other rows keep every bit.
        return torch.where((logit < 0)[:, None], moved.to(x.dtype), x)

    return operator


def _length(vector: Tensor) -> Tensor:
    length = vector.norm()
    if not length > 0:
        raise UserError("steering: a vector of length zero; use another layer or probe")
    return length


def steering_edits(
    direction: Direction,
    layers: Sequence[int],
    *,
    dose: float,
    norms: dict[int, float],
    where: Selection | None = None,
) -> tuple[Edit, ...]:
    """Add ``dose`` times the mean residual norm of each layer, along ``direction``.

    Args:
        norms: mean residual norm by layer, at the positions steered.
        where: default the final token, whose edit changes the first response token.
    """
    unit = direction.select(list(layers)).unit()
    missing = sorted(set(layers) - set(norms))
    if missing:
        raise UserError(f"steering: no residual norm for layer {missing[0]}; measure it first")
    return tuple(
        Edit(layer, where if where is not None else final(), add(unit.vectors[layer] * dose * norms[layer]))
        for layer in layers
    )
