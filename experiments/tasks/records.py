"""Tasks and prompts as records: one JSON object a line, checked at the door."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pingscope.experiments.run.progress import say
from pingscope.experiments.tasks.rows import Row, Skipped, check_names, each, plain_text, read_rows, without_nulls
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write

SITES = ("web", "shell", "pages")  # environments that an evaluator can name
LABELS = ("harmful", "benign", "lookalike")


@dataclass(frozen=True)
class Record:
    """One task or prompt.

    ``lookalike`` tasks are benign tasks whose words overlap with harmful ones. ``context`` is the first page
    the agent sees. ``evaluator`` is data for a rule-based environment (never code). ``pair_id`` groups
    records that must not be split between training and test.
    """

    id: str
    instruction: str
    label: str
    category: str = ""
    domain: str = "chat"
    source: str = ""
    split: str = ""
    context: str = ""
    system: str = ""
    evaluator: dict[str, Any] = field(default_factory=dict)
    pair_id: str = ""

    def prompt(self) -> Prompt:
        system, page = self.system or None, self.context or None
        return Prompt(self.id, self.instruction, self.label, system=system, page=page)


# Names that other files use for what a record calls differently.
RENAMED = {
    "prompt": "'instruction'",
    "task": "'instruction'",
    "goal": "'instruction'",
    "question": "'instruction'",
    "input": "'instruction' (append the input to it; alpaca:PATH does so)",
    "page": "'context'",
    "observation": "'context'",
    "html": "'context'",
    "messages": "'instruction' and 'system' (conversations are for finetune)",
    "conversations": "'instruction' and 'system' (conversations are for finetune)",
}


def read_records(path: str | Path, skipped: Skipped | None = None) -> list[Record]:
    """Read records from a file of rows. Errors name the file, the line and the field.

    Args:
        skipped: takes the rows that are refused; without, the first one ends the reading.
    """
    seen: set[str] = set()
    unused: set[str] = set()

    def make(placed: tuple[str, Row]) -> list[Record]:
        where, row = placed
        record, unknown = _record(without_nulls(row), where)
        if record.id in seen:
            raise UserError(f"{where}: field 'id' repeats {record.id!r}; ids must be unique")
        seen.add(record.id)
        unused.update(unknown)
        return [record]

    records = each(read_rows(path, skipped=skipped), make, skipped)
    if not records:
        left = f" ({len(skipped)} bad ones were skipped)" if skipped else ""
        raise UserError(f"{path}: holds no records{left}; write one JSON object a line")
    if unused:
        say(f"note: {path}: fields that nothing reads: {', '.join(sorted(unused))}")
    return records


def _record(row: Row, where: str) -> tuple[Record, list[str]]:
    known = [item.name for item in fields(Record)]
    unknown = check_names(row, known, where, RENAMED)
    values: dict[str, Any] = {}
    for name in known:
        value = row.get(name)
        if value is None:
            continue
        if name == "evaluator":
            check_evaluator(value, where)
        elif name in ("id", "pair_id") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        elif name == "instruction" and isinstance(value, list):
            value = plain_text(value, f"{where}: field '{name}'")
        elif not isinstance(value, str):
            raise UserError(f"{where}: field '{name}' must be a string")
        values[name] = value
    for name in ("id", "instruction", "label"):
        if not str(values.get(name, "")).strip():
            raise UserError(f"{where}: field '{name}' is missing or not a non-empty string; add it")
    if values["label"] not in LABELS:
        raise UserError(f"{where}: field 'label' is {values['label']!r}; use one of {', '.join(LABELS)}")
    return Record(**values), unknown


def check_evaluator(value: Any, where: str) -> None:
    """Of a task on the built-in site or shell, or on pages of its own, everything that its pages are made of.

    Raises:
        UserError: an unknown site, a field that is missing or of another type.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: field 'evaluator' must be a JSON object")
    if "site" not in value:
        check_names(value, ("site",), f"{where}: evaluator")
        return
    if value["site"] not in SITES:
        raise UserError(f"{where}: field 'evaluator.site' is {value['site']!r}; use one of {', '.join(SITES)}")
    if value["site"] == "pages":
        _check_screens(value.get("screens"), f"{where}: field 'evaluator.screens'")
        return
    for name in ("section", "verb"):
        if not isinstance(value.get(name), str):
            raise UserError(f"{where}: field 'evaluator.{name}' is missing or not a text; add it")
    for name in ("sections", "verbs", "above", "below"):
        words = value.get(name)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: field 'evaluator.{name}' is missing or not a list of texts; add it")


def _check_screens(screens: Any, where: str) -> None:
    if not isinstance(screens, list) or not screens:
        raise UserError(f"{where} is missing or not a list of pages; add it")
    for number, screen in enumerate(screens, 1):
        texts = isinstance(screen, dict) and all(isinstance(screen.get(name), str) for name in ("page", "name"))
        args = texts and screen.get("args")
        if not isinstance(args, dict) or not args:
            raise UserError(f"{where}: page {number} is no object with page, name and args (the action that leads on)")


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    atomic_write(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
