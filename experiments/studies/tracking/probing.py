"""Probes of one activation store: fitted, saved, and evaluated beside every control that the store allows.

A store knows activations, roles and labels, but no pairs, kinds of harm or texts: `pingscope cache` leaves those in
``records.json`` beside it, for folds that keep pairs whole, held-out kinds and baselines that see no activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pingscope.experiments.studies.tracking.prompts import layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, write_json
from pingscope.interp.store.activations import ActivationStore
from pingscope.probes.controls import evaluate, text_baselines, transfer_back
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.pooling import Pooled, pool

RECORDS = "records.json"


def write_records(folder: Path, records: Sequence[Record], rows: Sequence[Rendered]) -> None:
    """What probes need to know of the prompts, by id."""
    known = {
        record.id: {
            "group": record.pair_id or record.id,
            "category": record.category,
            "text": f"{record.instruction}\n{record.context}",
            "tokens": len(row),
        }
        for record, row in zip(records, rows, strict=True)
    }
    write_json(folder / RECORDS, known)


def probe_store(
    store_path: Path,
    out: Path,
    *,
    pooling: str,
    C: float | Literal["cv"],
    other_path: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit one probe a layer on ``store_path`` and save it under ``out`` with ``evaluation.json``.

    Args:
        other_path: a store of the same prompts through another checkpoint, for transfer there and back.

    Returns:
        ``layers`` (as :func:`pingscope.probes.controls.evaluate`, and ``C`` and ``converged``), ``baselines``, ``n``.

    Raises:
        UserError: a store without harmful or without benign prompts, another store of other prompts.
    """
    store = ActivationStore.open(store_path)
    store.verify()
    pooled = pool(store, pooling)
    for label in ("harmful", "benign"):
        if label not in pooled.labels:
            raise UserError(f"{store_path}: holds no {label} prompt; a probe needs harmful and benign ones")
    known = read_json(store_path / RECORDS) if (store_path / RECORDS).exists() else {}
    about = [known.get(prompt) or {} for prompt in pooled.prompt_ids]
    groups = [one.get("group", prompt) for one, prompt in zip(about, pooled.prompt_ids, strict=True)]
    other = None if other_path is None else _same_prompts(pooled, pool(_comparable(store, other_path), pooling))
    meta = {"pooling": pooling, **store_origin(store), "store": str(store_path)}
    probes = LayerProbes.fit(pooled.features, pooled.labels, groups=groups, C=C, seed=seed, meta=meta)
    scores = evaluate(
        pooled.features, pooled.labels, groups=groups, categories=[one.get("category", "") for one in about],
        transfer=other, C=C, seed=seed,
    )  # fmt: skip
    if other is not None:
        back = transfer_back(pooled.features, other, pooled.labels, groups=groups, C=C, seed=seed)
        scores = {layer: row | {"transfer_back_auroc": back[layer]} for layer, row in scores.items()}
    probes.save(out)
    facts = probes.meta
    layers = {
        layer_key(layer): plain(row) | {"C": facts["C"][str(layer)], "converged": facts["converged"][str(layer)]}
        for layer, row in scores.items()
    }
    baselines = {}
    if known:
        texts, lengths = [one["text"] for one in about], [one["tokens"] for one in about]
        baselines = plain(text_baselines(texts, pooled.labels, lengths=lengths, groups=groups, seed=seed))
    found = {"layers": layers, "baselines": baselines, "n": len(pooled.labels)}
    write_json(out / "evaluation.json", found)
    return found


def store_origin(store: ActivationStore) -> dict[str, Any]:
    """Which model a store was made on, as probes keep it (:func:`pingscope.interp.model.belonging.origin`)."""
    kept = ("d_model", "n_layers", "layer_convention")
    return {
        "model": store.meta.get("model_name", ""),
        "fingerprint": store.meta["identity"]["model"],
        "template": store.meta["identity"]["template"],
        **{name: store.meta[name] for name in kept if name in store.meta},
    }


def _comparable(store: ActivationStore, other_path: Path) -> ActivationStore:
    """Another checkpoint's store whose activations have the same width."""
    other = ActivationStore.open(other_path)
    other.verify()
    if other.meta["identity"]["model"] == store.meta["identity"]["model"]:
        raise UserError(
            f"--other {other_path}: is of the same model as {store.path}; give the store of the same prompts through "
            "another checkpoint"
        )
    if other.shape[1] != store.shape[1]:
        raise UserError(
            f"--other {other_path}: {other.shape[1]} wide, but {store.path} {store.shape[1]}; a transfer needs models "
            "of one architecture"
        )
    return other


def _same_prompts(here: Pooled, there: Pooled) -> Mapping[int, np.ndarray]:
    """The other store's features in this one's order of prompts."""
    at = {prompt: i for i, prompt in enumerate(there.prompt_ids)}
    lost = [prompt for prompt in here.prompt_ids if prompt not in at]
    if lost or set(here.features) - set(there.features):
        what = f"prompt {lost[0]!r}" if lost else f"layer {min(set(here.features) - set(there.features))}"
        raise UserError(f"--other: that store lacks {what}; cache the same prompts and layers with the other model")
    return there.take(np.array([at[prompt] for prompt in here.prompt_ids])).features
