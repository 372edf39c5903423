"""What a steering study takes from the agent itself: a shuffled-label direction and its reference answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pingscope.experiments.agents.rollout import Episode
from pingscope.experiments.studies.steering.side_effects import coherence
from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.tasks.records import Record
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.pooling import POOLINGS
from pingscope.steering.directions import Direction, from_probes

REFERENCES = 60  # benign answers at most, for the side effects


def shuffled_direction(model: HookedModel, records: Sequence[Record], probes: LayerProbes, seed: int) -> Direction:
    """The direction of a probe fitted like ``probes`` on ``records``, whose labels are shuffled.

    Groups keep no meaning under shuffled labels; pooling and regularisation are those of ``probes``.
    """
    pooling = probes.meta.get("pooling")
    pooling = pooling if pooling in POOLINGS else "mean_prompt"
    rows = [model.render(record.prompt()) for record in records]
    pooled = pooled_in_memory(model, rows, list(probes.layers), {pooling: pooling})[pooling]
    labels = np.random.default_rng(seed).permutation([record.label == "harmful" for record in records])
    return from_probes(LayerProbes.fit(pooled.features, labels.astype(int), seed=seed))


def reference_coherence(
    model: HookedModel, records: Sequence[Record], plain: Sequence[Episode]
) -> Callable[[Sequence[Edit]], dict[str, Any]] | None:
    """Side effects of edits on the first answers that the plain agent gave to benign tasks; ``None`` without any."""
    rows = [
        model.render(record.prompt(), response=episode.turns[0].text)
        for record, episode in zip(records, plain, strict=True)
        if record.label == "benign" and episode.turns[0].text
    ][:REFERENCES]
    return (lambda edits: coherence(model, rows, edits)) if rows else None
