"""Given probes read on given prompts: `pingscope track`. Takes published prompts and any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.studies.tracking.tracking import Tracking, group_ids, layer_key, plain, read_tracks
from pingscope.experiments.tasks.records import Record
from pingscope.interp.model.belonging import transfer_note
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.collapse import POSITIONS, Reference, readings
from pingscope.probes.logistic import C_DEFAULT, LayerProbes
from pingscope.probes.pooling import pool
from pingscope.steering.injection import Arm


def admit(
    probes: LayerProbes, models: Mapping[str, HookedModel], *, transfer: bool = False, path: str | Path = ""
) -> list[str]:
    """Refuse probes that are of none of the models; the paper's use, the base's probes on its agent, needs both.

    Args:
        transfer: read them on models that they were not fitted on; widths and depths must still agree.

    Returns:
        Sentences on transfers that were asked for, for the results.

    Raises:
        UserError: probes of another width or depth, or of none of the models.
    """
    found = [probes.check_model(model, transfer=True, path=path) for model in models.values()]
    if any(one["transfer"] is False for one in found):
        return []
    if not transfer:
        for model in models.values():
            probes.check_model(model, path=path)
    return [note for one in found if (note := transfer_note(one))]


def track_with(
    models: Mapping[str, HookedModel],
    arms: Sequence[Arm],
    probes: LayerProbes,
    tasks: Sequence[Record],
    out: Path,
    *,
    examples: int = 6,
    seed: int = 0,
    transfer: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tracks, curves, tokens and the readings of every arm against the first; no floor, so no verdicts.

    Raises:
        UserError: probes that :func:`admit` refuses.
    """
    for note in admit(probes, models, transfer=transfer):
        say(f"note: {note}")
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
