"""Muon in float32: momentum whose update is orthogonalised, for the matrices of the base.

The method of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Jordan et al., 2024; Liu et al., 2025). That
class orthogonalises in bfloat16, which a CPU without bfloat16 units emulates ten times slower than float32; here
matrices of one shape are also stacked and orthogonalised together, which halves the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz: singular values to about 1 in five steps
STEPS = 5


def orthogonalise(stack: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """Each matrix with its singular values pushed to about 1."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at the root-mean-square size of an AdamW update.

    ``lr`` is therefore on AdamW's scale; ``weight_decay`` is decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    gradient: torch.Tensor = parameter.grad  # type: ignore[assignment]  # only those with one are here
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)
