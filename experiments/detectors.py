"""Detectors compared on the tasks: trained and given their threshold on validation tasks, read on test tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.agents.records import Record
from experiments.tracking_job import layer_key, plain
from interp.model import HookedModel
from interp.selection import LayerSpec, resolve_layers
from probes.detectors import Prompts, best_layer, compare_detectors

TRAINED = 0.6  # share of the validation groups that trains; the rest chooses layer and threshold


def detector_study(
    models: Mapping[str, HookedModel],
    validation: Sequence[Record],
    test: Sequence[Record],
    *,
    layers: LayerSpec = "all",
    seed: int = 0,
) -> dict[str, Any]:
    """The section ``detectors`` of ``results.json``: per model ``layer``, ``n`` and the ``detectors`` with their rates.

    Look-alikes are benign in training and reported apart.
    """
    groups = [record.pair_id or record.id for record in validation]
    names = sorted(set(groups))
    picked = set(np.random.default_rng(seed).permutation(names)[: round(TRAINED * len(names))].tolist())
    training = np.array([group in picked for group in groups])
    section = {}
    for name, model in models.items():
        wanted = resolve_layers(layers, model.n_layers)
        before, after = read_prompts(model, validation, wanted), read_prompts(model, test, wanted)
        train = {layer: before[layer].take(training) for layer in wanted}
        selection = {layer: before[layer].take(~training) for layer in wanted}
        layer = best_layer(train, selection)
        section[name] = {
            "layer": layer_key(layer),
            "n": {"train": int(training.sum()), "selection": int((~training).sum()), "test": len(test)},
            "detectors": compare_detectors(train[layer], selection[layer], after[layer], seed=seed),
        }
    return plain(section)


def read_prompts(model: HookedModel, records: Sequence[Record], layers: list[int]) -> dict[int, Prompts]:
    """Token activations of every prompt per layer, kept as float32."""
    rows = [model.render(record.prompt()) for record in records]
    residuals = model.residuals(rows, layers)
    texts = [f"{record.instruction}\n{record.context}" for record in records]
    groups = [record.pair_id or record.id for record in records]
    return {
        layer: Prompts(
            [x[: row.n_prompt].float().cpu().numpy() for x, row in zip(states, rows, strict=True)],
            texts,
            [record.label for record in records],
            groups,
        )
        for layer, states in residuals.items()
    }
