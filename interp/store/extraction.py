"""Prompts → activation store: resumable, and the same bytes whether it was interrupted or not.

Everything is tokenised first, so the place of every row is known before the first forward pass. One batch is
one chunk: its rows are written in place, then its checksums go to the journal. A run that finds a store of
the same identity checks every chunk in the journal against its bytes and computes only what is missing.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.chat.tokenizer import tokenizer_identity
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_journal, read_json, remove_unfinished, sha256_of, write_json
from pingscope.interp.model.belonging import LAYER_CONVENTION
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import LayerSpec, Selection, find_matches, prompt, resolve_layers
from pingscope.interp.store.activations import DTYPES, FORMAT, INDEX, JOURNAL, LOCK, META, ActivationStore, check_meta
from pingscope.interp.store.layer_files import Chunk, LayerFiles, disk_error, locked

PACKAGE = Path(__file__).resolve().parents[1]
TIMED_SLOTS = 1024  # of the batch that an estimate runs


@dataclass(frozen=True)
class Cost:
    """What an extraction will keep, and how long it will take (None: not timed)."""

    tokens: int
    bytes: int
    seconds: float | None = None


@cache
def extraction_code() -> str:
    """Hex SHA-256 of the source that decides what is read of given ids: other code may give other numbers."""
    files = [file for part in ("model", "backends", "store") for file in (PACKAGE / part).rglob("*.py")]
    return sha256_of([[file.relative_to(PACKAGE).as_posix(), sha256_of(file.read_bytes())] for file in sorted(files)])


def estimate(
    model: HookedModel,
    rows: Sequence[Rendered],
    *,
    layers: LayerSpec = "all",
    where: Selection | None = None,
    dtype: str = "float32",
    token_budget: int | None = None,
    timed: bool = False,
) -> Cost:
    """Tokens and bytes on disk of :func:`extract` with the same arguments.

    ``timed`` adds seconds: a batch of middling length is run twice, cut to a few prompts where it is large, and
    its second time is scaled to all batches. Writing to the disk is not in it.
    """
    masks = find_matches(where or prompt(), rows)
    tokens, wanted = sum(map(sum, masks)), resolve_layers(layers, model.n_layers)
    size = tokens * len(wanted) * model.d_model * _dtype(dtype).itemsize
    if not timed:
        return Cost(tokens, size)
    plan = _plan(rows, masks, model.token_budget if token_budget is None else token_budget)
    chunk = plan[len(plan) // 2]
    while len(chunk.rows) > 1 and chunk.slots > TIMED_SLOTS:
        chunk = chunk.halves()[0]
    batch = model.batch(chunk.rows)
    for _ in range(2):  # the first run pays for memory and kernels
        start = time.perf_counter()
        with torch.inference_mode():
            model.read(batch, wanted, lambda layer, x: None)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Cost(tokens, size, seconds * sum(c.slots for c in plan) / chunk.slots)


def extract(
    model: HookedModel,
    rows: Sequence[Rendered],
    out_dir: str | Path,
    *,
    layers: LayerSpec = "all",
    where: Selection | None = None,
    dtype: str = "float32",
    token_budget: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ActivationStore:
    """Write the residual stream after ``layers`` at the tokens ``where`` (default: all of the prompt).

    Args:
        rows: prompts with distinct ids; the store keeps their order.
        dtype: ``float32`` or ``bfloat16``, as stored.
        token_budget: most slots in one forward pass (default: what suits the device). A resumed store keeps the
            one it was begun with, since other batches could round differently.
        progress: called with the number of prompts just finished (or found finished).

    A batch that does not fit in memory is cut in two, and so are those after it; the rows stay where they are.

    Raises:
        UserError: a store of another model or other prompts, a prompt too long or too large for the
            memory, values that are not finite, a full disk, another process at work on the store.
    """
    where = where or prompt()
    torch_dtype = _dtype(dtype)
    token_budget = model.token_budget if token_budget is None else token_budget
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f"prompt {row.id!r}: the id occurs twice; give every prompt its own")
        seen.add(row.id)
    model.check_context(rows)
    masks = find_matches(where, rows)
    wanted = resolve_layers(layers, model.n_layers)
    folder = Path(out_dir)
    identity = {
        "model": model.fingerprint,
        "backend": model.backend,
        "tokenizer": tokenizer_identity(model.tokenizer),
        "template": model.template_hash,
        "code": extraction_code(),
        "prompts": sha256_of([[row.id, row.label, list(row.ids), list(row.roles)] for row in rows]),
        "layers": wanted,
        "positions": str(where),
        "dtype": dtype,
    }
    with locked(folder):
        remove_unfinished(folder)
        meta = _begin(folder, identity, model, rows, masks, token_budget)
        shape = (meta["n_tokens"], model.d_model)
        plan = _plan(rows, masks, meta["token_budget"])
        with LayerFiles(folder, wanted, shape, dtype) as files:
            done, fresh = _valid_chunks(folder, files, plan), False
            run = _Run(model, files, torch_dtype)
            for number, chunk in enumerate(plan):
                if number not in done:
                    fresh = True
                    done[number] = run.chunk(chunk)
                    # Not synced: a lost line costs one batch, a sync per batch can cost as much as the batch.
                    _append(folder / JOURNAL, _journal_line(number, done[number]))
                if progress is not None:
                    progress(len(chunk.rows))
            files.sync()
        if fresh or not meta["complete"]:
            # An interrupted run's journal lists redone chunks twice: written anew, the folder is the same.
            lines = [_journal_line(number, done[number]) for number in range(len(plan))]
            atomic_write(folder / JOURNAL, "".join(lines))
            write_json(folder / META, meta | {"complete": True})
    return ActivationStore.open(folder)


def _plan(rows: Sequence[Rendered], masks: list[list[bool]], token_budget: int) -> list[Chunk]:
    kept = [[p for p, wanted in enumerate(mask) if wanted] for mask in masks]
    starts = [0]
    for positions in kept:
        starts.append(starts[-1] + len(positions))
    used = [i for i, positions in enumerate(kept) if positions]
    # Nothing after the last kept token can change it, so it is not computed.
    rows = [
        Rendered(r.id, r.label, r.ids[: k[-1] + 1], r.roles[: k[-1] + 1]) if k else r
        for r, k in zip(rows, kept, strict=True)
    ]
    return [
        Chunk([rows[used[i]] for i in order], [kept[used[i]] for i in order], [starts[used[i]] for i in order])
        for order in token_budget_batches([len(rows[i]) for i in used], token_budget)
    ]


class _Run:
    """Forward passes whose rows go to their places, in batches that shrink when the memory is short."""

    def __init__(self, model: HookedModel, files: LayerFiles, dtype: torch.dtype) -> None:
        self.model, self.files, self.dtype = model, files, dtype
        self.most: int | None = None  # slots that fit, once more did not

    def chunk(self, chunk: Chunk) -> dict[str, str]:
        """Run one batch, write its rows, and return their checksum per layer."""
        pending = [chunk]
        sums: dict[str, str] = {}
        while pending:
            part = pending.pop(0)
            if self.most is not None and part.slots > self.most and len(part.rows) > 1:
                pending = [*part.halves(), *pending]
                continue
            try:
                sums = self._batch(part)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._shrink(part, error)
            else:
                continue
            # Outside the handler, or the traceback would keep the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            pending = [part, *pending]
        if self.most is None:
            return sums
        return {str(layer): self.files.checksum(layer, chunk) for layer in self.files.layers}

    def _shrink(self, part: Chunk, error: BaseException) -> None:
        if len(part.rows) == 1:
            raise UserError(
                f"prompt {part.rows[0].id!r}: {len(part.rows[0])} tokens do not fit in the memory of "
                f"{self.model.device} even alone; use dtype bfloat16, device 'sharded' or a shorter prompt"
            ) from error
        self.most = part.slots // 2
        warnings.warn(f"out of memory at {part.slots} slots in a batch; going on with {self.most}", stacklevel=4)

    def _batch(self, chunk: Chunk) -> dict[str, str]:
        batch = self.model.batch(chunk.rows)
        width = batch.ids.shape[1]
        flat = torch.tensor(
            [i * width + p for i, kept in enumerate(chunk.kept) for p in kept], device=self.model.device
        )
        sums: dict[str, str] = {}
        staged: dict[int, Tensor] = {}

        def keep(layer: int, x: Tensor) -> None:
            found = x.reshape(-1, x.shape[-1]).index_select(0, flat.to(x.device)).to(self.dtype)
            if not found.is_cuda:
                sums[str(layer)] = write(layer, found.contiguous())
                return
            # A GPU is not made to wait for the disk: the copy runs behind it, files are written when all is there.
            staged[layer] = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            staged[layer].copy_(found, non_blocking=True)

        def write(layer: int, found: Tensor) -> str:
            if not bool(torch.isfinite(found).all()):
                bad = int((~torch.isfinite(found).all(-1)).nonzero()[0])
                row = chunk.rows[int(flat[bad]) // width]
                raise UserError(
                    f"prompt {row.id!r}: activations after layer {layer} are not finite "
                    f"(token {int(flat[bad]) % width}); load the model in float32 or leave this prompt out"
                )
            return self.files.write(layer, chunk, found)

        with torch.inference_mode():
            self.model.read(batch, self.files.layers, keep)
        if staged:
            torch.cuda.synchronize()
            with ThreadPoolExecutor() as pool:  # hashing and writing release the lock
                sums |= zip(map(str, staged), pool.map(write, staged, staged.values()), strict=True)
        return sums


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _valid_chunks(folder: Path, files: LayerFiles, plan: list[Chunk]) -> dict[int, dict[str, str]]:
    """Chunks whose bytes match their checksums. The last entry of a chunk counts."""
    journal = {line["chunk"]: line["sha256"] for line in read_journal(folder / JOURNAL)}
    return {
        number: sums
        for number, sums in journal.items()
        if number < len(plan)
        and all(sums.get(str(layer)) == files.checksum(layer, plan[number]) for layer in files.layers)
    }


def _begin(
    folder: Path,
    identity: dict[str, Any],
    model: HookedModel,
    rows: Sequence[Rendered],
    masks: list[list[bool]],
    token_budget: int,
) -> dict[str, Any]:
    """The meta data of the store in ``folder``: the one found there, or a new one with its index."""
    if (folder / META).exists():
        meta = read_json(folder / META)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{folder / META}: not a store of format {FORMAT}; choose another --out")
        check_meta(folder / META, meta)
        for field, value in identity.items():
            if meta["identity"].get(field) != value:
                raise UserError(
                    f"{folder}: this store belongs to another run: it differs in its {field} "
                    f"({_short(meta['identity'].get(field))}, now {_short(value)}); choose another --out"
                )
        if (folder / INDEX).is_file() and sha256_of((folder / INDEX).read_bytes()) == meta["index_sha256"]:
            return meta
        meta["complete"] = False
    else:
        others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(f".{META}")]
        if set(others) - {INDEX}:
            raise UserError(f"{folder}: not empty and not a store (no {META}); choose another --out")
        meta = {
            "format": FORMAT,
            "complete": False,
            "identity": identity,
            "model_name": model.name,
            "layer_convention": LAYER_CONVENTION,
            "n_prompts": len(rows),
            "n_tokens": sum(map(sum, masks)),
            "d_model": model.d_model,
            "n_layers": model.n_layers,
            "token_budget": token_budget,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        }
    index = _index(model, rows, masks)
    atomic_write(folder / INDEX, index)
    write_json(folder / META, meta | {"index_sha256": sha256_of(index)})
    return meta | {"index_sha256": sha256_of(index)}


def _index(model: HookedModel, rows: Sequence[Rendered], masks: list[list[bool]]) -> bytes:
    """The parquet file, as bytes."""
    kept = [(row, p) for row, mask in zip(rows, masks, strict=True) for p, wanted in enumerate(mask) if wanted]
    token_ids = [row.ids[p] for row, p in kept]
    texts = {i: model.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in set(token_ids)}
    table = pa.table(
        {
            "prompt_id": pa.array([row.id for row, _ in kept], pa.string()),
            "position": pa.array([p for _, p in kept], pa.int32()),
            "token_id": pa.array(token_ids, pa.int32()),
            "token": pa.array([texts[i] for i in token_ids], pa.string()),
            "role": pa.array([row.roles[p] for row, p in kept], pa.string()),
            "label": pa.array([row.label for row, _ in kept], pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"store dtype {dtype!r}: unknown; use {' or '.join(DTYPES)} (float16 overflows)")
    return DTYPES[dtype][0]


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(line)
    except OSError as error:
        raise disk_error(path.parent, error, len(line)) from error


def _journal_line(number: int, sums: dict[str, str]) -> str:
    return json.dumps({"chunk": number, "sha256": sums}) + "\n"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
