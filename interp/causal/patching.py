"""Activation patching between two checkpoints of one architecture: put one model's state into the other's run.

Denoising puts the base's state into the agent ("is it enough?"), noising the agent's into the base ("is it needed?").
A :class:`Patch` is an :class:`interp.model.hooks.Edit` whose new rows are what a :class:`Donor` computes on the same
prompt,
so it works wherever edits do: next-token logits, generation, whole episodes. A donor with partners reads *another*
prompt instead: the control that says whether the prompt's own state mattered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.components import Part
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit, Site, tap
from pingscope.interp.model.selection import EMBED, Selection

Metric = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]


@dataclass(frozen=True, order=True)
class Component:
    """One head, or the whole MLP (``head`` -1) of a layer."""

    layer: int
    head: int = -1

    def __str__(self) -> str:
        return f"mlp {self.layer}" if self.head < 0 else f"head {self.layer}.{self.head}"


def all_components(model: HookedModel) -> list[Component]:
    """Every head and every MLP: what can be patched one by one."""
    heads = range(-1, model.n_heads)
    return [Component(layer, head) for layer in range(model.n_layers) for head in heads]


@dataclass(frozen=True)
class Donor:
    """A model whose states are taken over, and what it has computed so far (kept on its device, in its dtype).

    ``partner`` gives the prompt to read for a prompt; default: the same. Where a partner's selection has another
    number of tokens, each token gets the one at the same fraction of it.
    """

    model: HookedModel
    partner: Callable[[Rendered], Rendered] | None = None
    name: str = "same prompt"
    known: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def states(self, rows: Sequence[Rendered], where: Selection, site: Site) -> list[Tensor]:
        """States (token, width) of the selected tokens of every row at ``site``."""
        missing = [row for row in rows if (site, where, row.ids, row.roles) not in self.known]
        for order in token_budget_batches([len(row) for row in missing], self.model.token_budget):
            self._read([missing[i] for i in order], where, site[1])
        return [self.known[site, where, row.ids, row.roles] for row in rows]

    def _read(self, rows: Sequence[Rendered], where: Selection, part: Part) -> None:
        # One pass reads every layer of the kind asked for: a map over layers asks for them all.
        depth = self.model.n_layers
        kinds: tuple[Part, ...] = ("residual",) if part == "residual" else ("attention", "heads", "mlp")
        sites: list[Site] = [(layer, kind) for layer in range(depth) for kind in kinds]
        sites += [(EMBED, "residual")] if part == "residual" else []
        sources = [self.partner(row) for row in rows] if self.partner else list(rows)
        batch = self.model.batch(sources)
        states: dict[Site, Tensor] = {}

        def keep(site: Site, x: Tensor) -> None:
            states[site] = x.detach().reshape(*batch.ids.shape, -1).clone()

        with torch.no_grad(), self.model.evaluating(), tap(self.model, sites, keep):
            self.model.base(**self.model.inputs(batch))
        for i, (row, source) in enumerate(zip(rows, sources, strict=True)):
            columns = _aligned(row, source, where).to(batch.ids.device)
            for site, x in states.items():
                self.known[site, where, row.ids, row.roles] = x[i, columns]


def _aligned(row: Rendered, source: Rendered, where: Selection) -> Tensor:
    """Columns of ``source`` that stand for the selected tokens of ``row``."""
    wanted, there = sum(where.mask(row)), torch.tensor(where.mask(source)).nonzero()[:, 0]
    if row is source or wanted == 0:
        return there
    if not len(there):
        raise UserError(f"patching: prompt {source.id!r} has no token in '{where}' to stand in for {row.id!r}'s")
    return there[torch.linspace(0, len(there) - 1, wanted).round().long()]


def _unbound(x: Tensor) -> Tensor:
    raise UserError("a patch depends on the prompts; run it through an edit of the model")


@dataclass(frozen=True, kw_only=True)
class Patch(Edit):
    """Replace a part of a layer by the donor's, at the selected prompt tokens; of ``heads`` only those named."""

    donor: Donor
    heads: tuple[int, ...] = ()
    fn: Callable[[Tensor], Tensor] = _unbound

    def bind(self, rows: Sequence[Rendered]) -> Edit:
        values = torch.cat(self.donor.states(rows, self.where, (self.layer, self.part)))
        if self.part != "heads" or not self.heads:
            return Edit(self.layer, self.where, lambda old: values, self.part)
        count = self.donor.model.n_heads

        def take_over(old: Tensor) -> Tensor:
            new = old.clone().reshape(len(old), count, -1)
            new[:, list(self.heads)] = values.to(old).reshape(len(old), count, -1)[:, list(self.heads)]
            return new.reshape(old.shape)

        return Edit(self.layer, self.where, take_over, self.part)

    @property
    def reads_prompt(self) -> bool:
        return False  # the donor's states are its own

    def identity(self, width: int) -> list[Any]:
        source = [self.donor.model.fingerprint, self.donor.name]
        return [self.layer, self.part, str(self.where), list(self.heads), source]


def patch_components(donor: Donor, components: Sequence[Component], where: Selection) -> list[Patch]:
    """The edits that give a set of heads and MLPs the donor's values at the selected tokens."""
    heads: dict[int, list[int]] = {}
    for component in components:
        if component.head >= 0:
            heads.setdefault(component.layer, []).append(component.head)
    patches = [
        Patch(layer=layer, where=where, part="heads", donor=donor, heads=tuple(sorted(own)))
        for layer, own in sorted(heads.items())
    ]
    mlps = sorted(component.layer for component in components if component.head < 0)
    return patches + [Patch(layer=layer, where=where, part="mlp", donor=donor) for layer in mlps]


def check_pair(one: HookedModel, other: HookedModel) -> None:
    """Two models whose states mean the same places.

    Raises:
        UserError: another number of layers, heads or coordinates.
    """
    sizes = [(model.n_layers, model.n_heads, model.d_model) for model in (one, other)]
    if sizes[0] != sizes[1]:
        named = [
            f"{m.name} has {s[0]} layers x {s[1]} heads x {s[2]}" for m, s in zip((one, other), sizes, strict=True)
        ]
        raise UserError(f"patching: {', '.join(named)}; give two checkpoints of one architecture")


def estimate_effects(
    model: HookedModel, donor: Donor, rows: Sequence[Rendered], where: Selection, metric: Metric
) -> dict[Component, Float[np.ndarray, " prompt"]]:
    """First-order effect on ``metric`` of patching each component alone: (donor - own) · gradient.

    One backward pass ranks all components, where patching them one by one takes a pass each. It is an estimate:
    rank with it, then measure.
    """
    sites: list[Site] = [(layer, part) for layer in range(model.n_layers) for part in ("heads", "mlp")]
    count = model.n_heads
    scores = {component: np.zeros(len(rows)) for component in all_components(model)}
    model.check_context(rows)
    for order in token_budget_batches([len(row) for row in rows], model.token_budget, padded=model.pads):
        mine = [rows[i] for i in order]
        batch = model.batch(mine, side="left")
        width = batch.ids.shape[1]
        states: dict[Site, Tensor] = {}
        with (
            torch.enable_grad(),
            model.evaluating(),
            tap(model, [(EMBED, "residual"), *sites], partial(_record, states)),
        ):
            logits = model.last_logits(batch).float()
            gradients = torch.autograd.grad(metric(logits).sum(), [states[site] for site in sites])
        columns = [torch.tensor(where.mask(row)).nonzero()[:, 0] + width - len(row) for row in mine]
        for site, gradient in zip(sites, gradients, strict=True):
            theirs = donor.states(mine, where, site)
            own, slope = (x.detach().reshape(*batch.ids.shape, -1) for x in (states[site], gradient))
            for j, i in enumerate(order):
                at = columns[j].to(own.device)
                effect = ((theirs[j].to(own) - own[j, at]) * slope[j, at]).double().sum(0)
                if site[1] == "mlp":
                    scores[Component(site[0])][i] = float(effect.sum())
                    continue
                for head, value in enumerate(effect.reshape(count, -1).sum(1).tolist()):
                    scores[Component(site[0], head)][i] = value
    return scores


def _record(states: dict[Site, Tensor], site: Site, x: Tensor) -> Tensor | None:
    if site[0] == EMBED:  # gradients start here, so that no weight needs one
        return x.detach().requires_grad_(True)
    states[site] = x
    return None
