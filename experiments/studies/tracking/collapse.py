"""The readings of the collapse for every arm and layer, with their noise floor, controls and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pingscope.experiments.studies.tracking.noise_floor import Floor, pooled_in_memory, random_weights
from pingscope.experiments.studies.tracking.prompts import Tracking, group_ids, layer_key
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.store.activations import ActivationStore
from pingscope.probes.collapse import POSITIONS, Reference, gap_restored, label_controls, placed_scores, readings
from pingscope.probes.logistic import LayerProbes, is_harmful
from pingscope.probes.pooling import Pooled, pool
from pingscope.probes.statistics import Estimate, auroc
from pingscope.probes.verdict import READINGS, control, noise_floor, verdict

SHUFFLED_PROBES = 3


def read_collapse(
    job: Tracking,
    stores: Mapping[str, ActivationStore],
    probes: LayerProbes,
    chat: Pooled,
    floor: int,
    floor_texts: Sequence[Prompt] | None,
) -> dict[str, Any]:
    """The sections ``collapse``, ``collapse_claims`` and ``floor``; ``chat`` trains the shuffled-label probes."""
    first = job.arms[0].name
    pooled = {name: {at: pool(store, kind) for at, kind in POSITIONS.items()} for name, store in stores.items()}
    reference = Reference(pooled[first], probes, group_ids(job.tasks), job.C, job.seed)
    texts = floor_texts or [record.prompt() for record in job.chat]
    floors = Floor(job.origin, job.rows(job.arms[0]), texts, floor, job.layers, job.seed)
    limits = noise_floor(reference, floors.updates(), job.layers)
    untrained = _untrained(job, reference)
    rng = np.random.default_rng(job.seed)
    tuned = [arm.name for arm in job.arms if arm.model != job.arms[0].model]  # the plain agent first
    labels = is_harmful([record.label for record in job.chat])
    mixed = [LayerProbes.fit(chat.features, rng.permutation(labels), C=job.C) for _ in range(SHUFFLED_PROBES)]
    collapse: dict[str, dict[str, Any]] = {arm.name: {} for arm in job.arms}
    for layer in job.layers:
        base = readings(reference, reference.pooled, layer)
        for name, positions in pooled.items():
            own = base if name == first else readings(reference, positions, layer)
            if name in tuned[1:]:
                own["contrast"]["final"]["gap_restored"] = gap_restored(reference, pooled[tuned[0]], positions, layer)
            shuffled = label_controls(reference, positions, mixed, layer)
            collapse[name][layer_key(layer)] = {
                **own,
                "floor": limits[layer],
                "controls": {"random_weights": untrained[layer], "shuffled_labels": shuffled},
                "verdict": verdict(base, own, limits[layer]),
            }
    for cells in collapse.values():
        control([cell["verdict"] for cell in cells.values()])
    claims = collapse_claims(collapse, tuned) + restored_claims(collapse, first, tuned)
    return {"collapse": collapse, "collapse_claims": claims, "floor": floors.summary()}


def collapse_claims(collapse: Mapping[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """One statement per reading for the first of ``arms``: in which layers it shows a collapse, if in any."""
    claims = []
    for reading in READINGS if arms else ():
        verdicts = {layer: row["verdict"][reading] for layer, row in collapse[arms[0]].items()}
        layers = [layer for layer, found in verdicts.items() if found["verdict"] == "collapse"]
        where = f"in {len(layers)} of {len(verdicts)} layers ({', '.join(layers)})" if layers else "in no layer"
        claims.append(
            {
                "id": f"collapse-{reading}",
                "text": f"{arms[0]}: the reading '{reading}' shows a collapse beyond the noise floor {where}.",
                "holds": bool(layers),
                "evidence": {f"layer {layer}": found["reason"] for layer, found in verdicts.items()},
            }
        )
    return claims


RESTORED = 0.5  # of the gap lost


def restored_claims(collapse: Mapping[str, Any], base: str, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Whether the prefix brings the signal back where it was lost: at the final token, where the base's gap is largest.

    Refusal may come back without it: then the prefix works around the collapse instead of undoing it.
    """
    prefixed = next((name for name in arms[1:] if name.endswith("+prefix")), None)
    if prefixed is None:
        return []
    before = {layer: row["contrast"]["final"]["gap"].value for layer, row in collapse[base].items()}
    layer = max(before, key=lambda at: np.nan_to_num(before[at], nan=-np.inf))
    final = {name: collapse[name][layer]["contrast"]["final"] for name in (base, *arms)}
    found = {name: cells["gap_restored"] for name, cells in final.items() if "gap_restored" in cells}
    share = found[prefixed]
    levels = ", ".join(f"{name} {final[name]['gap'].value:.1f}" for name in (base, arms[0], prefixed))
    said = "no gap was lost there" if np.isnan(share.value) else f"{_share(share)} of the gap lost comes back"
    return [
        {
            "id": "signal-restored",
            "text": f"The prefix brings the signal at the final token back: in layer {layer}, where the base's gap is "
            f"largest, {said} ({levels}).",
            "holds": None if np.isnan(share.value) else share.value >= RESTORED and share.ci[0] > 0,
            "evidence": {f"share restored, {name}": one for name, one in found.items()}
            | {"rule": f"≥ {100 * RESTORED:.0f}%, interval above 0"},
        }
    ]


def _share(found: Estimate) -> str:
    return f"{100 * found.value:.0f}% [{100 * found.ci[0]:.0f}, {100 * found.ci[1]:.0f}], n = {found.n}"


def _untrained(job: Tracking, reference: Reference) -> dict[int, dict[str, Estimate]]:
    """What a model of random weights shows at the final token, with probes of its own."""
    model = random_weights(job.origin, job.seed)
    chat = pooled_in_memory(model, job.chat_rows(model), job.layers, {"mean": "mean_prompt"})["mean"]
    probes = LayerProbes.fit(chat.features, [record.label for record in job.chat], C=job.C)
    pooled = pooled_in_memory(model, job.rows(job.arms[0]), job.layers, {"final": "final"})["final"]
    result = {}
    for layer in job.layers:
        rows, own, _ = placed_scores(reference, pooled, "final", layer)
        harmful, groups = reference.harmful[rows], reference.within(rows)
        z = probes.logits(pooled.features[layer][rows], layer)
        result[layer] = {
            "auroc": auroc(z, harmful, groups, seed=job.seed),
            "placed_auroc": auroc(own, harmful, groups, seed=job.seed),
        }
    return result
