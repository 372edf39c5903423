"""Residual activations on disk, readable with safetensors and pyarrow alone.

meta.json              of what: model, tokenizer, template, prompts, layers, positions, dtype
index.parquet          one row per kept token: prompt_id, position, token_id, token, role, label
layers/03.safetensors  tensor ``resid_post`` (token, d_model), rows as in the index (``embed`` for -1)
chunks.jsonl           checksums of the parts written; a finished store lists every part once
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_journal, read_json, sha256_of
from pingscope.interp.model.selection import EMBED

FORMAT = 1  # raised when the same inputs would give other bytes or another layout
META, INDEX, JOURNAL, LOCK = "meta.json", "index.parquet", "chunks.jsonl", ".lock"
TENSOR = "resid_post"
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def layer_file(folder: str | Path, layer: int) -> Path:
    """Where a layer's activations are."""
    return Path(folder) / "layers" / f"{'embed' if layer == EMBED else f'{layer:02d}'}.safetensors"


def header(layer: int, shape: tuple[int, int], dtype: str) -> bytes:
    """The bytes before the tensor in a safetensors file that holds one tensor."""
    size = shape[0] * shape[1] * DTYPES[dtype][0].itemsize
    body = json.dumps(
        {
            "__metadata__": {"layer": "embed" if layer == EMBED else str(layer), "format": "pt"},
            TENSOR: {"dtype": DTYPES[dtype][1], "shape": list(shape), "data_offsets": [0, size]},
        },
        separators=(",", ":"),
    ).encode()
    body += b" " * (-len(body) % 8)  # the format asks for aligned data
    return len(body).to_bytes(8, "little") + body


_META: dict[str, type] = {
    "complete": bool, "identity": dict, "n_tokens": int, "d_model": int, "token_budget": int, "index_sha256": str,
}  # fmt: skip
_IDENTITY: dict[str, type] = {"model": str, "template": str, "layers": list, "dtype": str}


def check_meta(file: Path, meta: Mapping[str, Any]) -> None:
    """Refuse a store's description with a field that is missing or of another type."""
    for fields, holder in ((_META, meta), (_IDENTITY, meta.get("identity"))):
        for name, kind in fields.items():
            value = holder.get(name) if isinstance(holder, Mapping) else None
            if type(value) is not kind:
                raise UserError(f"{file}: field {name} is {value!r:.40}; write the store again with `pingscope cache`")
    if meta["identity"]["dtype"] not in DTYPES or not all(type(layer) is int for layer in meta["identity"]["layers"]):
        raise UserError(f"{file}: layers or dtype are not a store's; write it again with `pingscope cache`")


class ActivationStore:
    """A finished store, memory-mapped: :meth:`open` it; :func:`pingscope.interp.store.extraction.extract` writes one.

    Attributes:
        path: its folder; meta: the contents of ``meta.json``; layers: sorted, -1 is ``embed``.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self.layers: list[int] = list(meta["identity"]["layers"])
        self.dtype: str = meta["identity"]["dtype"]
        self.shape: tuple[int, int] = (meta["n_tokens"], meta["d_model"])

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open a store.

        Raises:
            UserError: no store there, one that is unfinished, or files of the wrong size.
        """
        path = Path(path)
        if not (path / META).is_file():
            raise UserError(f"{path}: no activation store (no {META}); write one with `pingscope cache`")
        meta = read_json(path / META)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{path / META}: not a store of format {FORMAT}; write it again with `pingscope cache`")
        check_meta(path / META, meta)
        if not meta["complete"]:
            raise UserError(f"{path}: unfinished store; run the same `pingscope cache` again to complete it")
        store = cls(path, meta)
        for layer in store.layers:
            file = layer_file(path, layer)
            wanted = len(header(layer, store.shape, store.dtype)) + store.bytes_per_layer
            if not file.is_file() or file.stat().st_size != wanted:
                raise UserError(f"{file}: missing or of the wrong size; delete {path} and run `pingscope cache`")
        return store

    def verify(self) -> None:
        """Compare index and activations with their checksums; reads every byte once.

        Raises:
            UserError: names the file that was changed after it was written.
        """
        remedy = f"delete {self.path} and run `pingscope cache` again"
        file = self.path / INDEX
        if not file.is_file() or sha256_of(file.read_bytes()) != self.meta["index_sha256"]:
            raise UserError(f"{file}: not as it was written; {remedy}")
        journal = read_journal(self.path / JOURNAL)
        try:
            sums = {int(line["chunk"]): dict(line["sha256"]) for line in journal}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path / JOURNAL}: not the checksums of a store ({error}); {remedy}") from error
        chunks = self._chunks()
        if set(sums) != set(range(len(chunks))):
            raise UserError(f"{self.path / JOURNAL}: {len(sums)} parts for {len(chunks)} written; {remedy}")

        def changed(layer: int) -> bool:
            rows = self.layer(layer).view(torch.uint8).reshape(self.shape[0], -1).numpy()
            return any(
                hashlib.sha256(b"".join(rows[part].tobytes() for part in chunk)).hexdigest()
                != sums[number].get(str(layer))
                for number, chunk in enumerate(chunks)
            )

        with ThreadPoolExecutor() as pool:  # hashing releases the lock
            for layer, bad in zip(self.layers, pool.map(changed, self.layers), strict=True):
                if bad:
                    raise UserError(f"{layer_file(self.path, layer)}: not as it was written; {remedy}")

    def _chunks(self) -> list[list[slice]]:
        """The rows of every part written: prompts in one batch, cut after their last kept token."""
        positions = self.index["position"].to_numpy()
        lengths = [int(positions[end - 1]) + 1 for end in self.starts[1:]]
        return [
            [slice(int(self.starts[i]), int(self.starts[i + 1])) for i in order]
            for order in token_budget_batches(lengths, self.meta["token_budget"])
        ]

    def __repr__(self) -> str:
        return f"ActivationStore({self.path}, {self.shape[0]} tokens, layers {self.layers}, {self.dtype})"

    @property
    def bytes_per_layer(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype][0].itemsize

    @cached_property
    def index(self) -> pa.Table:
        """One row per token: prompt_id, position, token_id, token, role, label."""
        try:
            table = pq.read_table(self.path / INDEX)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{self.path / INDEX}: cannot read ({error}); run `pingscope cache` again") from error
        if len(table) != self.shape[0]:
            raise UserError(f"{self.path / INDEX}: {len(table)} rows for {self.shape[0]} tokens; delete the store")
        return table

    def layer(self, layer: int) -> Float[Tensor, "token d_model"]:
        """Activations after ``layer``, mapped from disk (writing to the tensor does not reach the file)."""
        if layer not in self.layers:
            raise UserError(f"{self.path}: no layer {layer}; the store has {self.layers}")
        offset = len(header(layer, self.shape, self.dtype))
        kind = np.float32 if self.dtype == "float32" else np.int16
        mapped = np.memmap(layer_file(self.path, layer), kind, "c", offset, self.shape)
        tensor = torch.from_numpy(mapped)
        return tensor if self.dtype == "float32" else tensor.view(torch.bfloat16)

    @cached_property
    def prompt_ids(self) -> list[str]:
        """Ids in the order of the prompts given, those without a kept token left out."""
        return self.index["prompt_id"].to_numpy()[self.starts[:-1]].tolist()

    @cached_property
    def labels(self) -> list[str]:
        """Label of every prompt, as ``prompt_ids``."""
        return self.index["label"].to_numpy()[self.starts[:-1]].tolist()

    @cached_property
    def starts(self) -> Int[np.ndarray, " prompts_and_end"]:
        """Index row where each prompt begins, and the number of rows at the end."""
        ids = self.index["prompt_id"].to_numpy()
        return np.flatnonzero(np.r_[True, ids[1:] != ids[:-1], True]).astype(np.int64)

    @cached_property
    def prompt_index(self) -> Int[np.ndarray, " token"]:
        """Number of the prompt (in ``prompt_ids``) of every index row."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def rows(self, prompt_id: str) -> slice:
        """The index rows of one prompt."""
        if prompt_id not in self._numbers:
            raise UserError(f"{self.path}: no prompt {prompt_id!r} in the store")
        number = self._numbers[prompt_id]
        return slice(int(self.starts[number]), int(self.starts[number + 1]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {prompt_id: i for i, prompt_id in enumerate(self.prompt_ids)}
