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
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); delete it or restore it") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """A JSON value. What other readers of JSON would take differently is refused.

    Raises:
        UserError: not JSON, two fields of one name, ``NaN``, half of a surrogate pair, a number of thousands of
            digits, nesting beyond what can be followed; names ``where`` and the line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_fields, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON ({error.msg}{line}); mend or delete it") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half of a surrogate pair (a cut emoji, \\ud83d); mend that text") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be read; flatten it") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise UserError(f"{where}: holds an integer of thousands of digits; write it as a text") from error
        raise UserError(f"{where}: {' '.join(str(error).split())[:120]}; mend that field") from error
    return value


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field '{next(name for name in names if names.count(name) > 1)}' comes twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON: write null, or a number")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty one.

    Raises:
        UserError: no such file, not YAML, a field that comes twice, nesting that cannot be followed, another type.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error

    class Loader(yaml.SafeLoader):
        """Refuses what a YAML parser would silently overwrite."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((name for k, name in enumerate(names) if name in names[:k]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"field {twice!r} comes twice", node.start_mark)
            return super().construct_mapping(node, deep=deep)

    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not valid YAML ({reason})") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: (top level): expected names and values, found a {type(value).__name__}")
    return {str(name): inner for name, inner in value.items()}


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
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = f"{path}:{number}"
        try:
            row = parse_json(line.decode(), where)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text; delete that line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}; delete that line")
        rows.append(row)
    return rows


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of bytes, or of the canonical JSON of anything else."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(raw).hexdigest()
