"""Rows of CSV and JSON files, each with the place it came from, so that an error can name file, row and field."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json

Row = dict[str, Any]
Placed = Iterator[tuple[str, Row]]  # ("file row N", row)


def find_files(path: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder in the order of their names."""
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no {pattern} file; give the data's own file or folder")
    return files


def csv_rows(path: Path, needed: Sequence[str]) -> Placed:
    """Rows of a CSV file with a header; fields may hold newlines and quotes."""
    if path.is_dir():
        (path,) = _only(path, "*.csv")
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first name.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file; get a fresh copy") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: field '{missing[0]}' is missing in the header; get a fresh copy")
    try:
        for number, row in enumerate(reader, 1):
            yield f"{path} row {number}", row
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error}); get a fresh copy") from error


def json_rows(path: Path, key: str | None = None) -> Placed:
    """Objects of a JSON list, or of the list under ``key``."""
    if path.is_dir():
        (path,) = _only(path, "*.json")
    value = read_json(path)
    if key is not None and isinstance(value, dict):
        if key not in value:
            raise UserError(f"{path}: field '{key}' is missing; get a fresh copy")
        value = value[key]
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON list of objects; get a fresh copy")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path} row {number}", row


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must be there and hold text."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field '{name}' is missing or empty; get a fresh copy")
    return value.strip()


def _only(folder: Path, pattern: str) -> list[Path]:
    files = find_files(folder, pattern)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(f"{folder}: holds several {pattern} files ({names}); give one of them")
    return files
