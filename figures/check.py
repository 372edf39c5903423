"""Checks at the door: a malformed results.json or tokens.json is named by file and field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError

SCHEMA_VERSION = 1
SECTIONS: dict[str, Any] = {
    "meta": dict,
    "behaviour": dict,
    "first_token": dict,
    "probes": dict,
    "baselines": dict,
    "tracks": dict,
    "curves": dict,
    "collapse": dict,
    "floor": dict,
    "detectors": dict,
    "attribution": dict,
    "readout": dict,
    "patching": dict,
    "restoration": dict,
    "steering": dict,
    "steering_coherence": dict,
    "gates": dict,
    "injection": dict,
    "search": dict,
    "claims": list,
    "dose_response": list,
}
KINDS: dict[Any, str] = {dict: "an object", list: "a list", str: "a string"}


def check_results(results: Any, path: Path) -> None:
    """Check the sections' kinds, every estimate, and the texts and numbers that figures rely on."""
    _is(results, dict, path, "(top level)")
    version = results.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        _fail(path, "schema_version", "must be an integer")
    if version > SCHEMA_VERSION:
        _fail(path, "schema_version", f"is {version}, this version reads up to {SCHEMA_VERSION}; update pingscope")
    for name, kind in SECTIONS.items():
        if results.get(name) is not None:
            _is(results[name], kind, path, name)
            _estimates(results[name], path, name)
    for index, claim in enumerate(results.get("claims") or []):
        _is(claim, dict, path, f"claims[{index}]")
        _is(claim.get("text"), str, path, f"claims[{index}].text")
        if claim.get("holds") not in (True, False, None):
            _fail(path, f"claims[{index}].holds", "must be true, false or null")
    candidates = (results.get("search") or {}).get("candidates") or []
    _is(candidates, list, path, "search.candidates")
    for index, candidate in enumerate(candidates):
        _is(candidate, dict, path, f"search.candidates[{index}]")
        _is(candidate.get("text"), str, path, f"search.candidates[{index}].text")
    for index, point in enumerate(results.get("dose_response") or []):
        _is(point, dict, path, f"dose_response[{index}]")
        if not isinstance(point.get("step"), int | float):
            _fail(path, f"dose_response[{index}].step", "must be a number")
    for arm, layers in (results.get("curves") or {}).items():
        for layer, labels in _is(layers, dict, path, f"curves.{arm}").items():
            for label, columns in _is(labels, dict, path, f"curves.{arm}.{layer}").items():
                where = f"curves.{arm}.{layer}.{label}"
                _columns(
                    _is(columns, dict, path, where), ("role", "slot", "slots", "value", "low", "high"), path, where
                )


def check_tokens(rows: Any, path: Path) -> None:
    _is(rows, list, path, "tokens")
    for index, row in enumerate(rows):
        where = f"tokens[{index}]"
        _is(row, dict, path, where)
        _is(row.get("arm"), str, path, f"{where}.arm")
        logits = _is(row.get("logits"), dict, path, f"{where}.logits")
        _columns(row, ("tokens", "roles"), path, where)
        for layer, column in logits.items():
            _is(column, list, path, f"{where}.logits.{layer}")
            if len(column) != len(row["tokens"]):
                _fail(path, f"{where}.logits.{layer}", f"has {len(column)} entries for {len(row['tokens'])} tokens")
            for value in column:
                _number(value, path, f"{where}.logits.{layer}")
        for name in ("tokens", "roles"):
            for word in row[name]:
                _is(word, str, path, f"{where}.{name}")


def _columns(table: dict[str, Any], names: tuple[str, ...], path: Path, where: str) -> None:
    lengths = {name: len(_is(table.get(name), list, path, f"{where}.{name}")) for name in names}
    if len(set(lengths.values())) > 1:
        _fail(path, where, f"has columns of unequal length ({', '.join(f'{k} {v}' for k, v in lengths.items())})")


def _estimates(value: Any, path: Path, where: str) -> None:
    """Every object with a ``value`` that is not a column is an estimate; look for them at any depth."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _estimates(item, path, f"{where}[{index}]")
    if not isinstance(value, dict):
        return
    if "value" in value and "ci" in value:
        _number(value["value"], path, f"{where}.value")
        ends = value["ci"]
        if ends is not None:
            if not isinstance(ends, list) or len(ends) != 2:
                _fail(path, f"{where}.ci", "must be null or a list of two numbers")
            for end in ends:
                _number(end, path, f"{where}.ci")
        return
    for name, item in value.items():
        _estimates(item, path, f"{where}.{name}")


def _number(value: Any, path: Path, where: str) -> None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)):
        return
    _fail(path, where, f"must be a finite number or null, found {value!r:.40}")


def _is(value: Any, kind: type, path: Path, where: str) -> Any:
    if not isinstance(value, kind):
        _fail(path, where, f"must be {KINDS[kind]}, found {'nothing' if value is None else type(value).__name__}")
    return value


def _fail(path: Path, where: str, what: str) -> None:
    raise UserError(f"{path}: field '{where}' {what}; run the stage that wrote it again")
