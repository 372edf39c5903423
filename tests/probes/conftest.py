"""Activation stores written by hand, and pooled activations with a planted signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pingscope.interp.files import sha256_of, write_json
from pingscope.interp.store.activations import FORMAT, ActivationStore, header, layer_file
from pingscope.probes.pooling import Pooled

Prompts = Sequence[tuple[str, str, Sequence[str]]]  # (id, label, role of every token)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., ActivationStore]:
    """``make_store(prompts, {layer: (token, d_model)})``; ``order`` permutes the rows of the index."""

    def make(prompts: Prompts, layers: dict[int, np.ndarray], order: Any = None) -> ActivationStore:
        folder = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        rows = [(name, label, i, role) for name, label, roles in prompts for i, role in enumerate(roles)]
        order = np.arange(len(rows)) if order is None else np.asarray(order)
        rows = [rows[i] for i in order]
        width = next(iter(layers.values())).shape[1]
        for layer, values in layers.items():
            path = layer_file(folder, layer)
            path.parent.mkdir(parents=True, exist_ok=True)
            data = values[order].astype(np.float32).tobytes()
            path.write_bytes(header(layer, (len(rows), width), "float32") + data)
        columns = {
            "prompt_id": [name for name, *_ in rows],
            "position": pa.array([i for _, _, i, _ in rows], pa.int32()),
            "token_id": pa.array([i for _, _, i, _ in rows], pa.int32()),
            "token": [f"t{i}" for _, _, i, _ in rows],
            "role": [role for *_, role in rows],
            "label": [label for _, label, _, _ in rows],
        }
        pq.write_table(pa.table(columns), folder / "index.parquet")
        identity = {"layers": sorted(layers), "dtype": "float32", "model": "none", "template": "none"}
        facts = {"format": FORMAT, "complete": True, "identity": identity, "d_model": width}
        write_json(
            folder / "meta.json",
            facts
            | {
                "n_tokens": len(rows),
                "token_budget": 512,
                "index_sha256": sha256_of((folder / "index.parquet").read_bytes()),
            },
        )
        return ActivationStore.open(folder)

    return make


@pytest.fixture
def planted() -> Callable[..., dict[str, Pooled]]:
    """``planted(gap)``: one layer of pooled activations whose harmful prompts lie ``gap`` along the first axis."""

    def make(gap: float, *, n: int = 120, d: int = 8, seed: int = 0, jitter: float = 0.0) -> dict[str, Pooled]:
        rng = np.random.default_rng(seed)
        labels = [("harmful", "benign", "lookalike")[i % 3] for i in range(n)]
        harmful = np.array(labels) == "harmful"
        x = rng.standard_normal((n, d))
        x[:, 0] += gap * (harmful - 0.5)
        x += jitter * np.random.default_rng(seed + 1).standard_normal((n, d))
        ids, counts = [f"p{i}" for i in range(n)], np.ones(n, np.int64)
        return {at: Pooled({0: x.copy()}, ids, labels, counts) for at in ("prompt", "instruction", "final")}

    return make
