"""Who wrote the signal: a linear readout of the residual stream, taken apart exactly.

The stream after layer l is the embedding plus what every attention layer and every MLP up to l added, so w·x + b is
the sum of their products with w, plus b. Nothing is approximated, no norm is frozen: the readout stands in the
residual stream itself. An attention layer's part is in turn the sum over its heads, each through its slice of the
output projection; behind a post-norm the norm's scale at that token, which all heads set together, is held fixed.

That the parts sum to the logit is checked on every prompt, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.components import HeadSplit, head_split, write_scale
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Site, tap
from pingscope.interp.model.selection import EMBED, Selection, final

Readout = tuple[np.ndarray, float]  # w (d_model,) and b in raw residual space

SLACK = 32  # rounding errors of the model's dtype, in units of |w| times the largest write, that a sum may be off


@dataclass(frozen=True)
class Attribution:
    """Parts of one readout's logit, averaged over the selected tokens of each prompt.

    ``parts`` has columns :attr:`components`: ``embed``, ``attention 0``, ``mlp 0``, …, ``intercept``; they sum to
    ``logit``. ``heads`` splits the attention columns; with ``head_bias`` (of the output projection) they sum to them.
    """

    layer: int
    components: tuple[str, ...]
    parts: Float[np.ndarray, "prompt component"]
    heads: Float[np.ndarray, "prompt layer head"]
    head_bias: Float[np.ndarray, "prompt layer"]
    logit: Float[np.ndarray, " prompt"]  # as read from the stream itself


def component_names(layer: int) -> tuple[str, ...]:
    """What writes into the stream up to ``layer``, in order, and the intercept."""
    writes = (f"{kind} {k}" for k in range(layer + 1) for kind in ("attention", "mlp"))
    return ("embed", *writes, "intercept")


def attribute(
    model: HookedModel,
    rows: Sequence[Rendered],
    readouts: Mapping[int, Readout],
    where: Selection | None = None,
    *,
    token_budget: int | None = None,
) -> dict[int, Attribution]:
    """Take ``readouts[layer]`` apart at the tokens ``where`` (default: the final one) of every prompt.

    Raises:
        UserError: an architecture whose writes do not sum to its stream (named with the size of the gap), a prompt
            without such tokens, a readout of another width.
    """
    where = final() if where is None else where
    layers = sorted(readouts)
    for layer in layers:
        if not 0 <= layer < model.n_layers or len(readouts[layer][0]) != model.d_model:
            raise UserError(
                f"attribution: readout at layer {layer}, {len(readouts[layer][0])} wide, does not fit {model.name} "
                f"({model.n_layers} layers x {model.d_model})"
            )
    missing = [row.id for row in rows if not any(where.mask(row))]
    if missing:
        raise UserError(f"attribution: prompt {missing[0]!r} has no token in '{where}'; leave it out")
    reader = _Reader(model, layers, np.stack([np.asarray(readouts[layer][0], np.float64) for layer in layers], 1))
    found: dict[str, list[np.ndarray]] = {}
    model.check_context(rows)
    order = token_budget_batches([len(row) for row in rows], token_budget or model.token_budget)
    for members in order:
        for name, values in reader.read([rows[i] for i in members], where).items():
            found.setdefault(name, []).append(values)
    back = np.argsort(np.concatenate(order))
    joined = {name: np.concatenate(pieces)[back] for name, pieces in found.items()}
    return {layer: _assemble(model, rows, joined, i, layer, readouts[layer]) for i, layer in enumerate(layers)}


class _Reader:
    """Products of every write with every readout direction, averaged over the selected tokens of a prompt."""

    def __init__(self, model: HookedModel, layers: list[int], directions: np.ndarray) -> None:
        self.model, self.layers = model, layers
        self.depth = max(layers) + 1
        wide = torch.float32 if model.device.type == "mps" else torch.float64
        self.w: Float[Tensor, "d_model readout"] = torch.as_tensor(directions, dtype=wide, device=model.device)
        self.splits = [head_split(model, k) for k in range(self.depth)]
        self.scale = write_scale(model)

    def read(self, rows: Sequence[Rendered], where: Selection) -> dict[str, np.ndarray]:
        batch = self.model.batch(rows)
        width = batch.ids.shape[1]
        mask = torch.tensor([[*where.mask(row), *[False] * (width - len(row))] for row in rows])
        owner = mask.nonzero()[:, 0].to(self.model.device)
        mask = mask.to(self.model.device)
        states: dict[Site, Tensor] = {}

        def keep(site: Site, x: Tensor) -> None:
            states[site] = x.reshape(*mask.shape, -1)[mask].to(self.w.dtype)

        sites: list[Site] = [(layer, "residual") for layer in sorted({EMBED, *self.layers})]
        sites += [(k, part) for k in range(self.depth) for part in ("attention", "heads", "mlp")]
        with torch.no_grad(), self.model.evaluating(), tap(self.model, sites, keep):
            self.model.base(**self.model.inputs(batch))
        counts = torch.bincount(owner, minlength=len(rows))

        def average(x: Tensor) -> np.ndarray:
            total = torch.zeros((len(rows), *x.shape[1:]), dtype=x.dtype, device=x.device).index_add_(0, owner, x)
            return (total / counts.reshape(-1, *[1] * (x.ndim - 1))).double().cpu().numpy()

        out = {f"residual {k}": average(states[k, "residual"] @ self.w) for k in (EMBED, *self.layers)}
        size = torch.stack([x.norm(dim=-1) for (_, part), x in states.items() if part != "heads"]).amax(0)
        out["size"] = average(size)
        for k in range(self.depth):
            out[f"attention {k}"] = self.scale * average(states[k, "attention"] @ self.w)
            out[f"mlp {k}"] = self.scale * average(states[k, "mlp"] @ self.w)
            by_head, bias = self._heads(self.splits[k], states[k, "heads"], states[k, "attention"])
            out[f"heads {k}"], out[f"bias {k}"] = self.scale * average(by_head), self.scale * average(bias)
        return out

    def _heads(self, split: HeadSplit, heads: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """(token, head, readout) and (token, readout) parts of what attention wrote."""
        matrix, bias = split.weight.to(self.w), split.bias.to(self.w)
        w, factor = self.w, torch.ones(len(heads), 1).to(self.w)
        if split.gain is not None:
            gain = split.gain.to(self.w)
            before = gain * (heads @ matrix.flatten(1).T + bias)
            # The norm multiplies a token by one number; least squares finds it without knowing its epsilon.
            factor = ((written * before).sum(-1) / (before**2).sum(-1).clamp(min=1e-30))[:, None]
            w = gain[:, None] * w
        toward = torch.einsum("dhs,dr->hsr", matrix, w)
        parts = torch.einsum("ths,hsr->thr", heads.reshape(len(heads), split.n_heads, -1), toward)
        return parts * factor[:, None], (bias @ w) * factor


def _assemble(
    model: HookedModel, rows: Sequence[Rendered], values: Mapping[str, np.ndarray], i: int, layer: int, readout: Readout
) -> Attribution:
    names = component_names(layer)
    intercept = np.full(len(rows), float(readout[1]))
    columns = {"embed": values[f"residual {EMBED}"][:, i], "intercept": intercept}
    parts = np.stack([columns[name] if name in columns else values[name][:, i] for name in names], 1)
    heads = np.stack([values[f"heads {k}"][..., i] for k in range(layer + 1)], 1)
    bias = np.stack([values[f"bias {k}"][:, i] for k in range(layer + 1)], 1)
    logit = values[f"residual {layer}"][:, i] + intercept
    assert heads.shape[2] == model.n_heads
    allowed = SLACK * torch.finfo(model.hf.dtype).eps * values["size"] * float(np.linalg.norm(readout[0]))
    attention = np.stack([values[f"attention {k}"][:, i] for k in range(layer + 1)], 1)
    for what, gap in (
        (f"the parts of the stream after layer {layer}", np.abs(parts.sum(1) - logit)),
        (f"the heads up to layer {layer}", np.abs(heads.sum(2) + bias - attention).max(1)),
    ):
        worst = int((gap - allowed).argmax())
        if gap[worst] > allowed[worst]:
            raise UserError(
                f"{model.name}: {what} do not sum to it (off by {gap[worst]:.3g} logits for prompt "
                f"{rows[worst].id!r}, rounding explains {allowed[worst]:.2g}); this architecture writes in a way that "
                "the family table does not describe"
            )
    return Attribution(layer, names, parts, heads, bias, logit)
