"""Which components stopped writing the signal: the base's probe at the final token, taken apart in base and agent.

Parts sum exactly to the logit (:mod:`interp.causal.attribution`), so the gap that a component lost (its harmful minus
benign
part, base minus agent, on the same prompts) adds up to the gap that the probe lost. Beside every part stand the range
that shuffled labels give it and the gap that random directions of the probe's length lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pingscope.experiments.studies.tracking.prompts import group_ids, layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.causal.attribution import Attribution, attribute
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import final
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.multiplicity import false_discovery, permuted_gaps
from pingscope.probes.statistics import column_gaps, column_means, difference
from pingscope.steering.directions import from_probes, random_like

MODELS = ("base", "agent")
MOST_LAYERS = 12
MOST_HEADS = 24
RANDOM_DIRECTIONS = 3


def shown_layers(layers: Sequence[int], most: int = MOST_LAYERS) -> list[int]:
    """All layers of a small model; of a deep one about ``most``, evenly spread, the last among them."""
    blocks = [layer for layer in layers if layer >= 0]
    if len(blocks) <= most:
        return blocks
    return sorted({blocks[round(i)] for i in np.linspace(0, len(blocks) - 1, most)})


def attribution_study(
    models: Mapping[str, HookedModel], probes: LayerProbes, tasks: Sequence[Record], *, seed: int = 0
) -> dict[str, Any]:
    """The section ``attribution`` of ``results.json``; harmful against benign tasks (look-alikes are left out).

    Returns:
        ``n``, ``position``, and per layer of the probe: ``components``; ``base`` and ``agent`` with ``harmful``,
        ``benign`` and ``gap`` by component; ``lost`` (gap of base minus gap of agent) with its false discovery rate
        ``q`` and the ``shuffled`` range; ``total`` (the same for the whole logit); ``heads``, ranked; ``random``.
    """
    tasks = [task for task in tasks if task.label in ("harmful", "benign")]
    harmful = np.array([task.label == "harmful" for task in tasks])
    groups = group_ids(tasks)
    layers = shown_layers(probes.layers)
    rows = {name: [models[name].render(task.prompt()) for task in tasks] for name in MODELS}

    def parts(direction: Any, intercepts: Mapping[int, float]) -> dict[str, dict[int, Attribution]]:
        readouts = {layer: (direction.vectors[layer], intercepts[layer]) for layer in layers}
        return {name: attribute(models[name], rows[name], readouts, final()) for name in MODELS}

    direction = from_probes(probes)
    intercepts = dict(zip(probes.layers, map(float, probes.intercepts), strict=True))
    found = parts(direction, intercepts)
    random = [
        parts(random_like(direction, seed + draw), dict.fromkeys(probes.layers, 0.0))
        for draw in range(RANDOM_DIRECTIONS)
    ]
    section = {
        layer_key(layer): _layer({name: found[name][layer] for name in MODELS}, harmful, groups, seed)
        | {"random": [_random(draw, layer, harmful, groups, seed) for draw in random]}
        for layer in layers
    }
    n = {"harmful": int(harmful.sum()), "benign": int((~harmful).sum())}
    return plain({"n": n, "position": str(final()), "layers": section})


def _layer(
    both: Mapping[str, Attribution], harmful: np.ndarray, groups: Sequence[str] | None, seed: int
) -> dict[str, Any]:
    base, agent = both["base"], both["agent"]
    lost = base.parts - agent.parts
    p, low, high = permuted_gaps(lost, harmful, groups=groups, seed=seed)
    p[-1] = np.nan  # the intercept is the same in both
    section: dict[str, Any] = {"components": list(base.components)}
    for name, one in both.items():
        section[name] = {
            "harmful": column_means(one.parts[harmful], seed=seed),
            "benign": column_means(one.parts[~harmful], seed=seed),
            "gap": column_gaps(one.parts, harmful, groups=groups, seed=seed),
        }
    section["lost"] = column_gaps(lost, harmful, groups=groups, seed=seed)
    section["q"] = false_discovery(p).tolist()
    section["shuffled"] = {"low": low.tolist(), "high": high.tolist()}
    section["total"] = {
        name: _gap(values, harmful, groups, seed)
        for name, values in (("base", base.logit), ("agent", agent.logit), ("lost", base.logit - agent.logit))
    }
    section["largest_residue"] = float(max(np.abs(one.parts.sum(1) - one.logit).max() for one in both.values()))
    section["heads"] = _heads(base, agent, harmful, groups, seed)
    return section


def _heads(
    base: Attribution, agent: Attribution, harmful: np.ndarray, groups: Sequence[str] | None, seed: int
) -> list[dict[str, Any]]:
    """Heads by how much of the gap they lost, largest first; the rate of false finds is over all of them."""
    names = [f"head {k}.{h}" for k in range(base.heads.shape[1]) for h in range(base.heads.shape[2])]
    before, after = (one.heads.reshape(len(one.heads), -1) for one in (base, agent))
    lost = before - after
    q = false_discovery(permuted_gaps(lost, harmful, groups=groups, seed=seed)[0])
    ranked = np.argsort(-np.abs(lost[harmful].mean(0) - lost[~harmful].mean(0)))[:MOST_HEADS]
    columns = [column_gaps(values[:, ranked], harmful, groups=groups, seed=seed) for values in (before, after, lost)]
    return [
        {"name": names[i], "base": columns[0][j], "agent": columns[1][j], "lost": columns[2][j], "q": float(q[i])}
        for j, i in enumerate(ranked)
    ]


def _random(
    draw: Mapping[str, Mapping[int, Attribution]],
    layer: int,
    harmful: np.ndarray,
    groups: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    base, agent = (draw[name][layer] for name in MODELS)
    each = base.parts - agent.parts
    return {
        "total": _gap(base.logit - agent.logit, harmful, groups, seed),
        "largest": float(np.abs(each[harmful].mean(0) - each[~harmful].mean(0)).max()),
    }


def _gap(values: np.ndarray, harmful: np.ndarray, groups: Sequence[str] | None, seed: int) -> Any:
    split = None
    if groups is not None:
        own = np.asarray(groups)
        split = (own[harmful], own[~harmful])
    return difference(values[harmful], values[~harmful], groups=split, seed=seed)
