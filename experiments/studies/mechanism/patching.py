"""Where restoring the base's state restores the refusal: residual stream, layer by role, both ways.

``denoise`` puts the base's state into the agent (is it enough?), ``noise`` the agent's into the base (is it needed?).
The number is the share of the difference between the two models' refusal log-odds that the patch moves the patched
model, on the same prompts; beside it what the first turn then says, judged. The control takes the state from a random
prompt of the other kind: what any foreign state of that model does at that place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pingscope.experiments.agents.rollout import AnyAction, run_episodes
from pingscope.experiments.studies.mechanism.attribution import shown_layers
from pingscope.experiments.studies.mechanism.decision import refusal_log_odds, refusal_tokens
from pingscope.experiments.studies.tracking.prompts import group_ids, layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.causal.patching import Donor, Patch, check_pair
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import EMBED, Selection, final, prompt, role
from pingscope.probes.multiplicity import false_discovery, p_beyond
from pingscope.probes.statistics import Estimate, mean, rate, ratio
from pingscope.probes.tracks import READING_ORDER
from pingscope.steering.injection import steered

DIRECTIONS = {"denoise": ("base", "agent"), "noise": ("agent", "base")}  # donor, patched model
LABELS = ("harmful", "benign")
JUDGED = ("instruction", "final")


def places(rows: Sequence[Rendered]) -> dict[str, Selection]:
    """Roles that every prompt has, the final token, and the whole prompt."""
    common = set.intersection(*(set(row.roles) for row in rows)) - {"response"}
    return {name: role(name) for name in READING_ORDER if name in common} | {"final": final(), "prompt": prompt()}


def patching_study(
    models: Mapping[str, HookedModel],
    tasks: Sequence[Record],
    *,
    judged: int = 40,
    max_new_tokens: int = 40,
    refusals: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """The section ``patching`` of ``results.json``.

    Args:
        judged: prompts per label whose first turn is generated and judged under each patch; 0: none.
        progress: called with 1 after each cell of the maps.

    Returns:
        ``measure, n, reference[model][label]``, ``maps[direction][label][layer][role]`` with ``moved`` (log-odds),
        ``share`` (of the models' difference), ``control`` and ``neutral`` (shares from other prompts), ``q`` of the
        share being above 0 after false discovery control; and ``outcome[direction][layer][role]`` with
        ``refusal_rate`` and, denoising, ``control``.
    """
    check_pair(models["base"], models["agent"])
    tasks = [task for task in tasks if task.label in LABELS]
    ids = refusal_tokens(models["base"], refusals)
    rows = {name: [model.render(task.prompt()) for task in tasks] for name, model in models.items()}
    before = {name: refusal_log_odds(models[name], rows[name], ids) for name in ("base", "agent")}
    labels = np.array([task.label for task in tasks])
    layers = [EMBED, *shown_layers(range(models["base"].n_layers))]
    where = places(rows["base"])
    study = _Patching(models, rows, before, ids, labels, group_ids(tasks), seed)
    maps: dict[str, Any] = {}
    outcome: dict[str, Any] = {}
    for direction, (giver, taker) in DIRECTIONS.items():
        same, foreign = donors(models[giver], rows[giver], labels, seed)
        neutral = neutral_donor(models[taker], rows[taker], labels, seed)
        prompts = PromptCache(models[taker])
        maps[direction] = {label: {layer_key(layer): {} for layer in layers} for label in LABELS}
        for layer in layers:
            for name, selection in where.items():
                patches = [Patch(layer=layer, where=selection, donor=donor) for donor in (same, foreign, neutral)]
                for label, cell in study.cells(giver, taker, patches, prompts).items():
                    maps[direction][label][layer_key(layer)][name] = cell
                progress(1)
        for label in LABELS:
            _control_finds(maps[direction][label])
        if judged:
            sources = (same, foreign) if direction == "denoise" else (same,)
            first = _first(tasks, judged)
            outcome[direction] = {
                layer_key(layer): {
                    name: _judged(models[taker], first, sources, layer, where[name], max_new_tokens, prompts)
                    for name in JUDGED
                    if name in where
                }
                for layer in layers
            }
    reference = {
        name: {label: mean(before[name][labels == label], seed=seed) for label in LABELS} for name in ("base", "agent")
    }
    n = {label: int((labels == label).sum()) for label in LABELS}
    measure = "log-odds that the answer begins with a refusal"
    return plain({"measure": measure, "n": n, "reference": reference, "maps": maps, "outcome": outcome})


@dataclass(frozen=True)
class _Patching:
    """The prompts of one study through both models, and their unpatched log-odds."""

    models: Mapping[str, HookedModel]
    rows: Mapping[str, Sequence[Rendered]]
    before: Mapping[str, np.ndarray]
    ids: Sequence[int]
    labels: np.ndarray
    groups: Sequence[str] | None
    seed: int

    def cells(self, giver: str, taker: str, patches: Sequence[Patch], prompts: PromptCache) -> dict[str, Any]:
        """One place of the maps, by label: patches from the same prompts, from other prompts, and a neutral one."""
        moved = [
            refusal_log_odds(self.models[taker], self.rows[taker], self.ids, [patch], prompts) - self.before[taker]
            for patch in patches
        ]
        cells = {}
        for label in LABELS:
            own = self.labels == label
            options: dict[str, Any] = {
                "groups": None if self.groups is None else np.asarray(self.groups)[own],
                "seed": self.seed,
            }
            gap = (self.before[giver] - self.before[taker])[own]
            shares = [ratio(one[own], gap, **options) for one in moved]
            names = ("share", "control", "neutral")
            cells[label] = {"moved": mean(moved[0][own], **options)} | dict(zip(names, shares, strict=True))
        return cells


def donors(model: HookedModel, rows: Sequence[Rendered], labels: np.ndarray, seed: int) -> tuple[Donor, Donor]:
    """One that reads the same prompt, and one that reads a random prompt of the other kind."""
    rng = random.Random(seed)
    by_label = {label: [row for row, own in zip(rows, labels, strict=True) if own == label] for label in LABELS}
    other = {
        row.ids: rng.choice(by_label["benign" if label == "harmful" else "harmful"])
        for row, label in zip(rows, labels, strict=True)
    }
    return Donor(model), Donor(model, partner=lambda row: other[row.ids], name=f"another prompt, seed {seed}")


def neutral_donor(model: HookedModel, rows: Sequence[Rendered], labels: np.ndarray, seed: int) -> Donor:
    """One that reads, for every prompt, a random benign prompt other than itself."""
    rng = random.Random(seed + 1)
    benign = [row for row, own in zip(rows, labels, strict=True) if own == "benign"]
    other = {row.ids: rng.choice([one for one in benign if one.ids != row.ids] or benign) for row in rows}
    return Donor(model, partner=lambda row: other[row.ids], name=f"another benign prompt, seed {seed}")


def _first(tasks: Sequence[Record], n: int) -> list[Record]:
    return [task for label in LABELS for task in [t for t in tasks if t.label == label][:n]]


def _judged(
    model: HookedModel,
    tasks: Sequence[Record],
    sources: Sequence[Donor],
    layer: int,
    where: Selection,
    max_new_tokens: int,
    prompts: PromptCache,
) -> dict[str, dict[str, Estimate]]:
    found: dict[str, dict[str, Estimate]] = {}
    for kind, donor in zip(("refusal_rate", "control"), sources, strict=False):
        arm = steered("patched", [Patch(layer=layer, where=where, donor=donor)])
        ran = run_episodes(model, tasks, AnyAction, arm, max_turns=1, max_new_tokens=max_new_tokens, prompts=prompts)
        for label in LABELS:
            refused = [episode.outcome() == "refused" for episode in ran if episode.label == label]
            found.setdefault(label, {})[kind] = rate(refused)
    return found


def _control_finds(cells: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Add ``q`` to every cell of a layer x role map: the share is above 0, over all cells at once."""
    every = [cell for by_role in cells.values() for cell in by_role.values()]
    q = false_discovery([p_beyond(cell["share"], 0.0, 1) for cell in every])
    for cell, value in zip(every, q, strict=True):
        cell["q"] = float(value)
