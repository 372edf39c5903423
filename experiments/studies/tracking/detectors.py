"""Detectors compared on the tasks: trained and given their threshold on validation tasks, read on test tasks.

The layer is chosen on prompt means alone; token activations are then kept of that layer and a few others only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pingscope.experiments.studies.mechanism.attribution import shown_layers
from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.studies.tracking.prompts import layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import LayerSpec, resolve_layers
from pingscope.probes.detectors import Prompts, best_layer, compare_detectors

TRAINED = 0.6  # share of the validation groups that trains; the rest chooses layer and threshold
DEEP = 3  # layers that the detector of several layers reads


def detector_study(
    models: Mapping[str, HookedModel],
    validation: Sequence[Record],
    test: Sequence[Record],
    *,
    layers: LayerSpec = "all",
    seed: int = 0,
) -> dict[str, Any]:
    """The section ``detectors`` of ``results.json``: per model ``layer``, ``deep_layers``, ``n`` and the ``detectors``
    with their rates.

    Look-alikes are benign in training and reported apart.
    """
    groups = [record.pair_id or record.id for record in validation]
    names = sorted(set(groups))
    picked = set(np.random.default_rng(seed).permutation(names)[: round(TRAINED * len(names))].tolist())
    training = np.array([group in picked for group in groups])
    section = {}
    for name, model in models.items():
        wanted = resolve_layers(layers, model.n_layers)
        means = _means(model, validation, wanted)
        layer = best_layer(
            {at: prompts.take(training) for at, prompts in means.items()},
            {at: prompts.take(~training) for at, prompts in means.items()},
        )
        deep = shown_layers(wanted, DEEP)
        before, after = (read_prompts(model, records, layer, deep) for records in (validation, test))
        section[name] = {
            "layer": layer_key(layer),
            "deep_layers": [layer_key(at) for at in deep],
            "n": {"train": int(training.sum()), "selection": int((~training).sum()), "test": len(test)},
            "detectors": compare_detectors(before.take(training), before.take(~training), after, seed=seed),
        }
    return plain(section)


def read_prompts(model: HookedModel, records: Sequence[Record], layer: int, deep: Sequence[int] = ()) -> Prompts:
    """Token activations of every prompt at ``layer``, and at the ``deep`` layers side by side; float32.

    From the first token of the instruction on: those before it cannot know it, they are the same in every prompt, and
    a detector that takes the largest of something would take theirs.
    """
    rows = [model.render(record.prompt()) for record in records]
    starts = [row.roles.index("instruction") if "instruction" in row.roles else 0 for row in rows]
    residuals = model.residuals(rows, sorted({layer, *deep}))
    states = {
        at: [x[start : row.n_prompt].float().cpu().numpy() for x, row, start in zip(found, rows, starts, strict=True)]
        for at, found in residuals.items()
    }
    joined = [np.concatenate(parts, 1) for parts in zip(*(states[at] for at in deep), strict=True)]
    return _described(states[layer], records, joined)


def _means(model: HookedModel, records: Sequence[Record], layers: list[int]) -> dict[int, Prompts]:
    """Prompt means as prompts of one token."""
    rows = [model.render(record.prompt()) for record in records]
    pooled = pooled_in_memory(model, rows, layers, {"mean": "mean_prompt"})["mean"]
    return {at: _described(list(x[:, None]), records) for at, x in pooled.features.items()}


def _described(states: Sequence[np.ndarray], records: Sequence[Record], deep: Sequence[np.ndarray] = ()) -> Prompts:
    texts = [f"{record.instruction}\n{record.context}" for record in records]
    groups = [record.pair_id or record.id for record in records]
    return Prompts(states, texts, [record.label for record in records], groups, deep)
