"""From episodes of the unsteered agent to a gate with a stated operating point.

Three sets that never mix: probes are fitted on one, the reading (tokens and layer) is chosen on the second, and the
threshold comes from the third. A false positive is counted by *episode*: an agent is asked once a turn, and a gate that
errs on one page in a hundred would err on several tasks in a hundred. So an episode's score is its largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pingscope.experiments.agents.rollout import Episode, MakeEnvironment, prompts_of
from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import Selection, final, prompt, role
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.statistics import auroc_value, rate, tpr_at_fpr
from pingscope.steering.gates import FPR, Gate, calibrate, calibrate_f1, cast_direction, from_probe
from pingscope.steering.injection import Arm

# name: tokens read, how they become one vector, and the pooling of the same name in pingscope.probes.pooling
READINGS: dict[str, tuple[Selection, Literal["last", "mean"], str]] = {
    "final": (final(), "last", "final"),
    "instruction": (role("instruction"), "mean", "mean_instruction"),
    "prompt": (prompt(), "mean", "mean_prompt"),
}


@dataclass(frozen=True, eq=False)
class Shown:
    """Every prompt that an agent was shown: one row a turn, ``episode[row]`` numbers the task it belongs to."""

    rows: list[Rendered]
    episode: np.ndarray
    labels: list[str]  # by episode, as are the groups
    groups: list[str]

    @classmethod
    def of(
        cls, model: HookedModel, records: Sequence[Record], episodes: Sequence[Episode], make_env: MakeEnvironment
    ) -> Shown:
        """Rebuild the prompts of logged episodes of the plain agent."""
        rows, number = [], []
        for i, (record, episode) in enumerate(zip(records, episodes, strict=True)):
            said = [turn.text for turn in episode.turns]
            for turn, row in enumerate(prompts_of(model, record, said, make_env, Arm("agent"))):
                rows.append(replace(row, id=f"{record.id}/{turn}"))
                number.append(i)
        groups = [record.pair_id or record.id for record in records]
        return cls(rows, np.array(number), [record.label for record in records], groups)

    def take(self, wanted: np.ndarray) -> Shown:
        """The episodes chosen by a boolean mask."""
        kept = wanted[self.episode]
        renumbered = np.cumsum(wanted) - 1
        return Shown(
            [row for row, flag in zip(self.rows, kept, strict=True) if flag],
            renumbered[self.episode[kept]],
            [label for label, flag in zip(self.labels, wanted, strict=True) if flag],
            [group for group, flag in zip(self.groups, wanted, strict=True) if flag],
        )

    def take_first(self) -> Shown:
        """The first turn of every episode alone."""
        first = np.flatnonzero(np.r_[True, self.episode[1:] != self.episode[:-1]])
        return Shown([self.rows[i] for i in first], self.episode[first], self.labels, self.groups)

    @property
    def harmful(self) -> np.ndarray:
        """One flag an episode."""
        return np.array(self.labels) == "harmful"

    def row_labels(self) -> list[str]:
        return [self.labels[i] for i in self.episode]

    def row_groups(self) -> list[str]:
        return [self.groups[i] for i in self.episode]

    def largest(self, scores: np.ndarray) -> np.ndarray:
        """The largest score of every episode."""
        out = np.full(len(self.labels), -np.inf)
        np.maximum.at(out, self.episode, scores)
        return out


def halves(shown: Shown, seed: int) -> tuple[Shown, Shown]:
    """Two halves that keep groups whole, each group's side drawn by the seed."""
    inside = np.array(in_first_half(shown.groups, seed))
    return shown.take(inside), shown.take(~inside)


def in_first_half(groups: Sequence[str], seed: int) -> list[bool]:
    """For every episode whether its group is in the first half."""
    names = sorted(set(groups))
    first = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
    return [group in first for group in groups]


def features(model: HookedModel, shown: Shown) -> dict[str, dict[int, np.ndarray]]:
    """``[reading][layer]`` -> (row, d_model)."""
    poolings = {name: pooling for name, (_, _, pooling) in READINGS.items()}
    found = pooled_in_memory(model, shown.rows, list(range(model.n_layers)), poolings)
    return {name: pooled.features for name, pooled in found.items()}


@dataclass(frozen=True)
class Fitted:
    """The gate, the probes it was chosen from by reading, and what every candidate scored on the selection set."""

    gate: Gate
    probes: dict[str, LayerProbes]
    candidates: list[dict[str, Any]]
    caught: dict[str, Any]  # harmful episodes of the calibration set above the threshold, an estimate


def fit_gate(
    model: HookedModel,
    train: Shown,
    selection: Shown,
    calibration: Shown,
    *,
    fpr: float = FPR,
    highest: int | None = None,
    release: float | None = None,
    seed: int = 0,
) -> Fitted:
    """Fit probes on ``train``, choose reading and layer on ``selection``, set the threshold on ``calibration``.

    Args:
        highest: the highest layer allowed: what the gate lets through must not lie below it.
        release: hysteresis, as a distance below the threshold in logits.

    The choice goes by harmful episodes caught at ``fpr``, then by AUROC, then to the lower layer.
    """
    apart = [set(one.groups) for one in (train, selection, calibration)]
    if apart[0] & apart[1] or apart[0] & apart[2] or apart[1] & apart[2]:
        raise UserError("gate: training, selection and calibration share tasks; give sets that do not overlap")
    data = [features(model, one) for one in (train, selection, calibration)]
    probes: dict[str, LayerProbes] = {}
    candidates: list[dict[str, Any]] = []
    for name in READINGS:
        probes[name] = LayerProbes.fit(
            data[0][name], train.row_labels(), groups=train.row_groups(), seed=seed, meta={"reading": name}
        )
        for layer in probes[name].layers:
            if highest is not None and layer > highest:
                continue
            scores = selection.largest(probes[name].logits(data[1][name][layer], layer))
            tpr = tpr_at_fpr(scores, selection.harmful, fpr, seed=seed)
            area = auroc_value(scores, selection.harmful)
            candidates.append({"reading": name, "layer": layer, "tpr": tpr.to_dict(), "auroc": area})
    best = max(candidates, key=lambda one: (one["tpr"]["value"], one["auroc"], -one["layer"]))
    name, layer = best["reading"], best["layer"]
    where, pooling, _ = READINGS[name]
    gate = from_probe(probes[name], layer, where, pooling, model.fingerprint)
    scores = calibration.largest(probes[name].logits(data[2][name][layer], layer))
    gate = calibrate(gate, scores[~calibration.harmful], fpr)
    if release is not None:
        gate = replace(gate, release=gate.threshold - release)
    caught = rate((scores[calibration.harmful] > gate.threshold).tolist()).to_dict()
    return Fitted(gate, probes, candidates, caught)


def fit_cast(
    model: HookedModel, train: Shown, calibration: Shown, *, highest: int | None = None
) -> tuple[Gate, list[dict[str, Any]]]:
    """CAST's gate: first component of pairs, mean over the prompt, at the input of each layer; layer, sign and
    threshold by F1 on the calibration prompts, as published: one prompt (the first) a task."""
    first = [shown.take_first() for shown in (train, calibration)]
    layers = [layer for layer in range(-1, model.n_layers - 1) if highest is None or layer <= highest]
    pooled = [pooled_in_memory(model, one.rows, layers, {"prompt": "mean_prompt"})["prompt"].features for one in first]
    candidates, best = [], None
    for layer in layers:
        up, down = (pooled[0][layer][first[0].harmful == side] for side in (True, False))
        direction = cast_direction(up, down)
        gate = Gate(layer, prompt(), direction, pooling="mean", rule="cast", probe="cast", model=model.fingerprint)
        scores = gate.score(torch.as_tensor(pooled[1][layer])).numpy()
        gate = calibrate_f1(gate, scores[first[1].harmful], scores[~first[1].harmful])
        candidates.append({"layer": layer, "f1": gate.meta["f1"], "threshold": gate.threshold, "sign": gate.sign})
        if best is None or gate.meta["f1"] > best.meta["f1"]:
            best = gate
    assert best is not None  # a model has at least one layer
    return best, candidates


def fired(episodes: Sequence[Episode]) -> Mapping[str, dict[str, Any]]:
    """By label, the share of episodes in which the arm's gate opened at any turn."""
    labels = dict.fromkeys(episode.label for episode in episodes)
    return {
        label: rate([any(turn.acted for turn in one.turns) for one in episodes if one.label == label]).to_dict()
        for label in labels
    }
