"""Where the safety signal is: probes, tracks over positions, and the readings of the collapse.

Probes are fitted on chat instructions and read on agent prompts, as in the paper (section 5). The first arm is
the reference that every other arm is compared with, on the same prompts. Activations are kept in stores (a second
run finds them), with the probes and the per-prompt values beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pingscope.experiments.studies.tracking.collapse import read_collapse
from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.studies.tracking.prompts import Tracking, group_ids, layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write
from pingscope.interp.model.belonging import origin
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import LayerSpec, resolve_layers
from pingscope.interp.store.activations import ActivationStore
from pingscope.probes.controls import evaluate, text_baselines
from pingscope.probes.logistic import C_DEFAULT, LayerProbes
from pingscope.probes.pooling import POOLINGS, pool, read_tokens
from pingscope.probes.statistics import Estimate, difference
from pingscope.probes.tracks import by_role, curves, summarise, token_logits, token_rows, values_table

if TYPE_CHECKING:
    from pingscope.steering.injection import Arm

LABELS = ("harmful", "benign", "lookalike")


def fit_probes(
    models: Mapping[str, HookedModel],
    chat: Sequence[Record],
    out_dir: str | Path,
    *,
    layers: LayerSpec = "all",
    C: float = C_DEFAULT,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit, save (``probes/MODEL-POOLING/``) and evaluate the probes of every model and pooling on chat prompts.

    Args:
        models: of one architecture, by the names that arms use; every one is also read with the other's probe.

    Returns:
        The section ``probes`` of ``results.json`` as plain JSON values.
    """
    job = Tracking(
        models, [], chat, [], Path(out_dir), resolve_layers(layers, next(iter(models.values())).n_layers), C, seed
    )
    pooled = {name: {pooling: pool(job.chat_store(name), pooling) for pooling in POOLINGS} for name in models}
    labels, groups = [record.label for record in chat], group_ids(chat)
    kinds = [record.category for record in chat]
    table: dict[str, Any] = {}
    for name, model in models.items():
        others = [other for other in models if other != name]
        table[name] = {}
        for pooling in POOLINGS:
            features = pooled[name][pooling].features
            meta = {"pooling": pooling, **origin(model)}
            found = LayerProbes.fit(features, labels, groups=groups, C=C, seed=seed, meta=meta)
            found.save(job.out / "probes" / f"{name}-{pooling}")
            transfer = pooled[others[0]][pooling].features if others else None
            scores = evaluate(features, labels, groups=groups, categories=kinds, transfer=transfer, C=C, seed=seed)
            table[name][pooling] = {layer_key(layer): row for layer, row in scores.items()}
    return plain(table)


def track(
    models: Mapping[str, HookedModel],
    arms: Sequence[Arm],
    chat: Sequence[Record],
    tasks: Sequence[Record],
    out_dir: str | Path,
    probes: LayerProbes,
    *,
    C: float = C_DEFAULT,
    floor: int = 20,
    floor_texts: Sequence[Prompt] | None = None,
    examples: int = 6,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Read every arm on ``tasks`` with one model's ``probes``, at their layers.

    Args:
        models: by the names that the arms use.
        arms: the first is the reference, without an injection. Arms with edits have no track.
        chat: what ``probes`` were fitted on; the shuffled-label probes are fitted on it too.
        floor: number of updates without behaviour change; ``floor_texts`` are what they train on (default: the
            chat prompts).
        examples: prompts whose tokens are kept for display.

    Returns:
        The sections ``baselines, tracks, curves, tokens, collapse, collapse_claims, floor`` of ``results.json`` as
        plain JSON values. Writes ``activations/`` and ``tracks.parquet``.

    Raises:
        UserError: arms with edits, no harmful or no benign chat prompt, and whatever extraction refuses.
    """
    steered = [arm.name for arm in arms if arm.edits or arm.gate]
    if steered:
        raise UserError(f"track: arm {steered[0]!r} edits activations; track only arms that change the text")
    job = Tracking(models, arms, chat, tasks, Path(out_dir), list(probes.layers), C, seed)
    say("tracks: agent activations")
    stores = {arm.name: job.store(arm.name, models[arm.model], job.rows(arm)) for arm in arms}
    sections = read_tracks(job, stores, probes, examples)
    say("collapse: noise floor and readings")
    pooled_chat = pool(job.chat_store(arms[0].model), probes.meta["pooling"])
    sections |= read_collapse(job, stores, probes, pooled_chat, floor, floor_texts)
    lengths = {"chat": job.chat_rows(job.origin), "agent_prompts": job.rows(arms[0])}
    records = {"chat": chat, "agent_prompts": tasks}
    baselines = {name: _baselines(records[name], rows, seed) for name, rows in lengths.items()}
    return plain({"baselines": baselines, **sections})


def read_tracks(
    job: Tracking, stores: Mapping[str, ActivationStore], probes: LayerProbes, examples: int
) -> dict[str, Any]:
    """The sections ``tracks``, ``curves`` and ``tokens``; per-prompt values go to ``tracks.parquet``."""
    summaries: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    tables, shown = [], []
    for name, store in stores.items():
        tokens = read_tokens(store.index)
        summaries[name], lines[name] = {}, {}
        for layer in job.layers:
            logits = token_logits(store, probes, layer)
            roles = by_role(tokens, logits)
            summaries[name][layer_key(layer)] = summarise(roles, seed=job.seed)
            lines[name][layer_key(layer)] = curves(tokens, logits, seed=job.seed)
            tables.append(values_table(name, layer, roles))
        for row in token_rows(store, probes, _examples(job.tasks, examples), job.layers):
            logits_by_key = {layer_key(layer): values for layer, values in row["logits"].items()}
            shown.append({"arm": name, **row, "logits": logits_by_key})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink)
    atomic_write(job.out / "tracks.parquet", sink.getvalue().to_pybytes())
    return {"tracks": summaries, "curves": lines, "tokens": shown}


def final_gap(
    model: HookedModel, tasks: Sequence[Record], probes: LayerProbes, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """``[layer]`` -> harmful minus benign logit at the final token, an estimate as plain JSON."""
    rows = [model.render(task.prompt()) for task in tasks]
    pooled = pooled_in_memory(model, rows, list(probes.layers), {"final": "final"})["final"]
    labels = np.array(pooled.labels)
    result = {}
    for layer in probes.layers:
        z = probes.logits(pooled.features[layer], layer)
        result[layer_key(layer)] = difference(z[labels == "harmful"], z[labels == "benign"], seed=seed).to_dict()
    return result


def residual_norms(model: HookedModel, tasks: Sequence[Record], layers: LayerSpec = "all") -> dict[int, float]:
    """Mean norm of the residual at the final token, per layer: the unit of steering doses."""
    rows = [model.render(task.prompt()) for task in tasks]
    wanted = resolve_layers(layers, model.n_layers)
    pooled = pooled_in_memory(model, rows, wanted, {"final": "final"})["final"]
    return {layer: float(np.linalg.norm(x, axis=1).mean()) for layer, x in pooled.features.items()}


def _baselines(records: Sequence[Record], rows: Sequence[Rendered], seed: int) -> dict[str, Estimate]:
    texts = [f"{record.instruction}\n{record.context}" for record in records]
    labels, lengths = [record.label for record in records], [len(row) for row in rows]
    return text_baselines(texts, labels, lengths=lengths, groups=group_ids(records), seed=seed)


def _examples(tasks: Sequence[Record], n: int) -> list[str]:
    """The first prompts of every label in turn."""
    by_label = [[task.id for task in tasks if task.label == label] for label in LABELS]
    return [ids[i] for i in range(n) for ids in by_label if i < len(ids)][:n]
