"""The one reader of rows: JSON lines, JSON, CSV, TSV and parquet, told apart by what is in the file.

Every row comes with its place, so that an error can name file, line and field. Nothing is guessed: two fields of one
name, ``NaN``, cut emoji and integers too long to be numbers are refused, not mended.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pingscope.interp.errors import UserError
from pingscope.interp.files import parse_json

Row = dict[str, Any]
Placed = Iterator[tuple[str, Row]]  # ("file:line" or "file row N", row)
T = TypeVar("T")

KINDS = "JSON lines, a JSON list, CSV, TSV or parquet"
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass
class Skipped:
    """Rows that were left out because they are bad, with the reason of each."""

    rows: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def each(rows: Iterable[T], make: Callable[[T], Iterable[Any]], skipped: Skipped | None) -> list[Any]:
    """What ``make`` gives for every row. A row that it refuses ends the reading, or is noted in ``skipped``."""
    made: list[Any] = []
    for row in rows:
        try:
            made += make(row)
        except UserError as error:
            if skipped is None:
                raise
            skipped.rows.append(str(error))
    return made


def find_files(path: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder in the order of their names."""
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no {pattern} file; give the data's own file or folder")
    return files


def read_rows(path: str | Path, key: str | None = None, skipped: Skipped | None = None) -> Placed:
    """Rows of a file, or of the only file of a folder.

    Args:
        path: a local file, or ``hf://datasets/OWNER/NAME/FILE`` on the hub.
        key: where the rows are a list under a key of one JSON object.
        skipped: takes lines that are no rows; without, the first one ends the reading.

    Raises:
        UserError: names file, line and remedy.
    """
    local = _local(path)
    raw = _bytes(local)
    if raw[:4] == b"PAR1":
        yield from _parquet(local, raw)
        return
    text = _text(local, raw)
    start = text.lstrip()[:1]
    if start == "[" or (start == "{" and (key is not None or not _by_line(text))):
        yield from _json(local, text, key)
    elif start == "{" or local.suffix not in (".csv", ".tsv"):
        yield from _lines(local, text, skipped)
    else:
        yield from csv_rows(local, ())


def csv_rows(path: Path, needed: Sequence[str]) -> Placed:
    """Rows of a CSV or TSV file with a header; fields may hold newlines and quotes."""
    path = _local(path, "*.csv")
    if _bytes(path)[:4] == b"PAR1" or path.suffix in (".json", ".jsonl"):
        for where, row in read_rows(path):
            missing = [name for name in needed if name not in row]
            if missing:
                raise UserError(f"{where}: field '{missing[0]}' is missing; get a fresh copy")
            yield where, row
        return
    text = _text(path, _bytes(path))
    delimiter = "\t" if "\t" in text.partition("\n")[0] and "," not in text.partition("\n")[0] else ","
    csv.field_size_limit(2**31 - 1)  # a page may be longer than the default of 128 KB
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        for name in needed:
            if name not in names:
                raise UserError(f"{path}: field '{name}' is missing in the header; get a fresh copy")
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: the header names field '{twice}' twice; rename one")
        reader.fieldnames = names
        for number, row in enumerate(reader, 1):
            if None in row:
                raise UserError(f"{path} row {number}: has more fields than the header; quote fields that hold commas")
            yield f"{path} row {number}", row
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error}); get a fresh copy") from error


def json_rows(path: Path, key: str | None = None, skipped: Skipped | None = None) -> Placed:
    """Objects of a JSON list, of the list under ``key``, or of JSON lines."""
    return read_rows(_local(path, "*.json*"), key, skipped)


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must be there and hold text; parts of text are joined."""
    value = row.get(name)
    text = plain_text(value, f"{where}: field '{name}'") if value is not None else ""
    if not text.strip():
        raise UserError(f"{where}: field '{name}' is missing or empty; give it a text, or get a fresh copy")
    return text.strip()


def plain_text(value: Any, where: str) -> str:
    """Text, or a list of text parts as chat endpoints write them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part if isinstance(part, str) else _part(part, where) for part in value]
        return "".join(parts)
    raise UserError(f"{where} is {_kind(value)}, not a text; write it as a string")


def check_names(row: Row, known: Iterable[str], where: str, renamed: dict[str, str] | None = None) -> list[str]:
    """Fields of ``row`` that nobody reads. One that is surely meant for another name is refused.

    Raises:
        UserError: a misspelled field, or one of ``renamed``, with the name to use.
    """
    names = list(known)
    unknown = [name for name in row if name not in names]
    for name in unknown:
        close = difflib.get_close_matches(str(name).lower(), names, 1, 0.8)
        meant = (renamed or {}).get(name) or (f"'{close[0]}'" if close else None)
        if meant is not None:
            raise UserError(f"{where}: field '{name}' is not known; did you mean {meant}? Rename or remove it")
    return unknown


def without_nulls(row: Row) -> Row:
    """A row without the fields that are null, as pandas and parquet write what is absent."""
    return {name: value for name, value in row.items() if value is not None and not _is_nan(value)}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        text = part.get("text", part.get("content"))
        if isinstance(text, str):
            return text
    kind = part.get("type", "object") if isinstance(part, dict) else _kind(part)
    raise UserError(f"{where} holds a part of type {kind!r}; only text is read, remove that part")


_TEXT_PARTS = ("text", "input_text", "output_text", None)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _local(path: str | Path, pattern: str = "*") -> Path:
    """The file on this machine; the only fitting one of a folder."""
    name = str(path)
    if name.startswith("hf:/"):
        return _from_hub(name)
    found = Path(name).expanduser()
    if not found.is_dir():
        return found
    files = [file for file in find_files(found, pattern) if file.is_file() and not file.name.startswith(".")]
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(f"{found}: holds several files or none that fit {pattern} ({names}); give one of them")
    return files[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, _, rest = name.split(":", 1)[1].strip("/").removeprefix("datasets/").partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise UserError(f"{name}: names no file; write hf://datasets/OWNER/NAME/FILE, such as …/data/train.parquet")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: cannot be had from the hub ({reason}); give a local copy") from error


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; pass a file of {KINDS}, or a preset such as webdojo:PATH") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); pass a file of {KINDS}") from error


def _text(path: Path, raw: bytes) -> str:
    encoding = next((name for bom, name in _BOMS if raw.startswith(bom)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {error.start}); pass a file of {KINDS}") from error
    if "\n" not in text:
        text = text.replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path}: is empty; write one JSON object a line")
    return text


def _by_line(text: str) -> bool:
    """Whether the first line is an object of its own: JSON lines, not one object over many lines."""
    line = text.lstrip().partition("\n")[0].rstrip()
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError as error:
        # A first line that is broken is still a line where others follow that begin like it.
        return line.endswith("}") or (isinstance(error, json.JSONDecodeError) and "\n{" in text and len(line) > 1)
    return True


def _lines(path: Path, text: str, skipped: Skipped | None) -> Placed:
    # Only a line end ends a line: U+2028 and its like stand inside of texts.
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def row(placed: tuple[str, str]) -> list[tuple[str, Row]]:
        where, line = placed
        return [(where, _object(parse_json(line.rstrip("\r"), where), where))]

    yield from each(numbered, row, skipped)


def _json(path: Path, text: str, key: str | None) -> Placed:
    value = parse_json(text, str(path))
    if isinstance(value, dict) and key is not None and key not in value:
        raise UserError(f"{path}: field '{key}' is missing; get a fresh copy")
    if isinstance(value, dict):
        value = value[key] if key is not None else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, found {_kind(value)}; get a fresh copy")
    for number, row in enumerate(value, 1):
        yield f"{path} row {number}", _object(row, f"{path} row {number}")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {_kind(value)}; write one object a line")
    return value


def _parquet(path: Path, raw: bytes) -> Placed:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(io.BytesIO(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a readable parquet file ({reason}); get a fresh copy") from error
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row
