"""What an edit does to a row of the residual stream. Each operator returns a function (row, d_model) → same shape.

``w`` and ``b`` are a probe's raw-space direction and intercept: w·x + b is the safety logit, positive = harmful. The
last three act only on rows below the boundary and leave the others exactly unchanged, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from pingscope.interp.errors import UserError
from pingscope.interp.model.hooks import Condition, Edit
from pingscope.interp.model.selection import Selection, final
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.directions import Direction

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


def displaced_along(operator: Operator, vector: ArrayLike) -> Operator:
    """Move every row as far as ``operator`` would, but along ``vector``: the norm-matched control of any operator."""
    v = torch.as_tensor(np.asarray(vector, np.float64))
    u = (v / _length(v)).float()

    def control(x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        far = (operator(x).to(wide) - wide).norm(dim=-1, keepdim=True)
        return torch.where(far > 0, (wide + far * u.to(wide)).to(x.dtype), x)

    return control


def steering_edits(
    direction: Direction,
    layers: Sequence[int],
    *,
    dose: float,
    norms: Mapping[int, float],
    unit: Literal["norm", "logit"] = "norm",
    where: Selection | None = None,
    when: Condition | None = None,
) -> tuple[Edit, ...]:
    """Add a dose of ``direction`` to the residual stream after each of ``layers``.

    Args:
        dose: in mean residual norms of the layer, or, with ``unit="logit"``, in safety logits: the edit then moves
            the logit of the probe that ``direction`` was taken from by ``dose``. :func:`in_logits` converts.
        norms: mean residual norm by layer, at the positions steered.
        where: default the final token, whose edit changes the first response token.
        when: a gate; rows on which it is closed stay as they are.
    """
    chosen = direction.select(list(layers))
    missing = sorted(set(layers) - set(norms))
    if missing and unit == "norm":
        raise UserError(f"steering: no residual norm for layer {missing[0]}; measure it first")
    lengths = chosen.norms()
    unit_direction = chosen.unit()
    size = {layer: dose * (norms[layer] if unit == "norm" else 1 / lengths[layer]) for layer in layers}
    return tuple(
        Edit(
            layer,
            where if where is not None else final(),
            add(unit_direction.vectors[layer] * size[layer]),
            when=when,
        )
        for layer in layers
    )


def in_logits(
    direction: Direction, layers: Sequence[int], *, dose: float, norms: Mapping[int, float]
) -> dict[int, float]:
    """A dose in residual norms as the change of each layer's safety logit; ``direction`` is the probes' own, unscaled.

    The change is what the layer's edit does there by itself: edits of earlier layers add to it on their way.
    """
    lengths = direction.select(list(layers)).norms()
    return {layer: dose * norms[layer] * lengths[layer] for layer in layers}


def operator_edits(
    probes: LayerProbes,
    operator: str,
    layers: Sequence[int],
    *,
    amount: float = 0.0,
    where: Selection | None = None,
    when: Condition | None = None,
    control: Direction | None = None,
) -> tuple[Edit, ...]:
    """One of the operators that know the probe's boundary, on several layers.

    Args:
        operator: ``ablate``, ``boundary``, ``target`` or ``mirror``.
        amount: of ``boundary`` the margin, of ``target`` the safety logit, of ``mirror`` alpha; ``ablate`` has none.
        control: move every row equally far along this direction instead.
    """
    make: dict[str, Callable[[ArrayLike, float], Operator]] = {
        "ablate": lambda w, b: ablate(w),
        "boundary": lambda w, b: to_boundary(w, b, amount),
        "target": lambda w, b: set_logit(w, b, amount),
        "mirror": lambda w, b: mirror(w, b, amount),
    }
    if operator not in make:
        raise UserError(f"steering: unknown operator {operator!r}; use add, {', '.join(make)}")
    edits = []
    for layer in layers:
        if layer not in probes.layers:
            raise UserError(f"steering: no probe for layer {layer}; this probe has {list(probes.layers)}")
        i = probes.layers.index(layer)
        fn = make[operator](probes.directions[i], float(probes.intercepts[i]))
        fn = fn if control is None else displaced_along(fn, control.vectors[layer])
        edits.append(Edit(layer, where if where is not None else final(), fn, when=when))
    return tuple(edits)
