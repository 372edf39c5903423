"""Atomic files and content hashes: what a run writes is either whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError

MKSTEMP_LETTERS = 8  # of the random ending that mkstemp gives


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write ``data`` to ``path`` through a synced temporary file in the same folder and one rename.

    Raises:
        UserError: the disk refuses the write (full, read-only); the old file stays as it was.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)  # mkstemp is private by default; results are meant to be shared
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or choose another --out") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a kill in the middle of :func:`atomic_write` left in ``folder``; nobody else may be writing there."""
    for leftover in folder.glob(f".*.{'?' * MKSTEMP_LETTERS}"):
        leftover.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Atomically write indented JSON; NaN is refused because no other JSON reader takes it."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or malformed file is a :class:`UserError` that names the file."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it or restore it") from error


def append_jsonl(path: str | Path, *rows: dict[str, Any]) -> None:
    """Append records and sync them, so that a kill loses at most the lines being written."""
    path = Path(path)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two processes may keep one journal
            handle.write(lines)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or choose another --out") from error


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Read a journal written by :func:`append_jsonl`; a torn last line (a kill while writing) is cut off."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # without it a line that is being written would look torn
        raw = handle.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error.msg}); delete that line") from error
    return rows


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of bytes, or of the canonical JSON of anything else."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(raw).hexdigest()
