"""Given probes read on given prompts: `pingscope track`. Takes published prompts and any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.studies.tracking.tracking import Tracking, group_ids, layer_key, plain, read_tracks
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.collapse import POSITIONS, Reference, readings
from pingscope.probes.logistic import C_DEFAULT, LayerProbes
from pingscope.probes.pooling import pool
from pingscope.steering.injection import Arm


def track_with(
    models: Mapping[str, HookedModel],
    arms: Sequence[Arm],
    probes: LayerProbes,
    tasks: Sequence[Record],
    out: Path,
    *,
    examples: int = 6,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tracks, curves, tokens and the readings of every arm against the first; no floor, so no verdicts.

    Raises:
        UserError: probes of another width or of layers the model lacks, or of another checkpoint than any given.
    """
    for model in models.values():
        if probes.directions.shape[1] != model.d_model or max(probes.layers) >= model.n_layers:
            raise UserError(
                f"probes: {probes.directions.shape[1]} wide, layers up to {max(probes.layers)}, but {model.name} has "
                f"{model.n_layers} layers x {model.d_model}; fit them on its own store (pingscope cache, then probe)"
            )
    fitted_on = probes.meta.get("fingerprint")
    if fitted_on and fitted_on not in {model.fingerprint for model in models.values()}:
        say("note: the probes were fitted on another checkpoint; readings mix the signal with that difference")
    job = Tracking(models, arms, (), tasks, out, list(probes.layers), C_DEFAULT, seed)
    stores = {arm.name: job.store(arm.name, models[arm.model], job.rows(arm)) for arm in arms}
    sections = read_tracks(job, stores, probes, examples)
    labels = {task.label for task in tasks}
    if "harmful" in labels and len(labels) > 1:
        pooled = {name: {at: pool(store, kind) for at, kind in POSITIONS.items()} for name, store in stores.items()}
        reference = Reference(pooled[arms[0].name], probes, group_ids(tasks), C_DEFAULT, seed)
        sections["collapse"] = {
            name: {layer_key(layer): readings(reference, positions, layer) for layer in job.layers}
            for name, positions in pooled.items()
        }
    return plain(sections)
