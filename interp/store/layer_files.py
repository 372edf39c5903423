"""The layer files of a store while they are written: full size from the start, rows in place, one writer."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.store.activations import DTYPES, LOCK, header, layer_file


@dataclass(frozen=True)
class Chunk:
    """One batch: its prompts, the kept positions of each, and where their rows begin in the store."""

    rows: list[Rendered]
    kept: list[list[int]]
    starts: list[int]

    @property
    def slots(self) -> int:
        """Tokens of the padded batch."""
        return len(self.rows) * max(map(len, self.rows))

    def halves(self) -> list[Chunk]:
        """The same prompts as two batches."""
        middle = len(self.rows) // 2
        cuts = (slice(None, middle), slice(middle, None))
        return [Chunk(self.rows[cut], self.kept[cut], self.starts[cut]) for cut in cuts]


class LayerFiles:
    """The layer files of a store under construction, at full size from the start."""

    def __init__(self, folder: Path, layers: list[int], shape: tuple[int, int], dtype: str) -> None:
        self.folder, self.layers, self.shape, self.dtype = folder, layers, shape, dtype
        self.row_bytes = shape[1] * DTYPES[dtype][0].itemsize
        self._open: dict[int, tuple[int, int]] = {}  # layer → descriptor, bytes before the tensor

    def __enter__(self) -> LayerFiles:
        try:
            for layer in self.layers:
                path, head = layer_file(self.folder, layer), header(layer, self.shape, self.dtype)
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self._open[layer] = descriptor, len(head)
                size = len(head) + self.shape[0] * self.row_bytes
                if os.fstat(descriptor).st_size != size:
                    os.truncate(descriptor, size)
                if hasattr(os, "posix_fallocate"):  # a full disk shows now, not hours into the run
                    os.posix_fallocate(descriptor, 0, size)
                if os.pread(descriptor, len(head), 0) != head:
                    os.pwrite(descriptor, head, 0)
        except OSError as error:
            self.__exit__()
            raise disk_error(self.folder, error, len(self.layers) * self.shape[0] * self.row_bytes) from error
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _head in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(self, layer: int, chunk: Chunk, found: Tensor) -> str:
        """Put the rows of a chunk in their places; returns their SHA-256."""
        descriptor, head = self._open[layer]
        raw = found.view(torch.uint8).reshape(-1).numpy().data
        cursor = 0
        try:
            for start, size in self._extents(chunk):
                piece = raw[cursor : cursor + size]
                while piece:  # the system may take less than it is given
                    written = os.pwrite(descriptor, piece, head + start + size - len(piece))
                    piece = piece[written:]
                cursor += size
        except OSError as error:
            raise disk_error(self.folder, error, len(raw)) from error
        return hashlib.sha256(raw).hexdigest()

    def checksum(self, layer: int, chunk: Chunk) -> str:
        """SHA-256 of a chunk's rows as they are on disk."""
        descriptor, head = self._open[layer]
        digest = hashlib.sha256()
        for start, size in self._extents(chunk):
            digest.update(os.pread(descriptor, size, head + start))
        return digest.hexdigest()

    def sync(self) -> None:
        """Make sure the bytes are on the disk before the store is called complete."""
        for descriptor, _head in self._open.values():
            os.fsync(descriptor)

    def _extents(self, chunk: Chunk) -> Iterator[tuple[int, int]]:
        for start, kept in zip(chunk.starts, chunk.kept, strict=True):
            yield start * self.row_bytes, len(kept) * self.row_bytes


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer per store. The lock ends with the process, however that ends."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: another process is writing this store; wait for it or choose another --out"
        ) from error
    finally:
        os.close(descriptor)


def disk_error(folder: Path, error: OSError, size: int) -> UserError:
    """The one line for a write of ``size`` bytes that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot write ({error.strerror})"
    return UserError(
        f"{folder}: {what}, {size / 1e9:.2f} GB wanted; free space and run again (what is done is "
        "kept), or keep fewer layers, fewer positions or --dtype bfloat16"
    )
