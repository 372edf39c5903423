"""Tasks and prompts as records: one JSON object a line, checked at the door."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write

LABELS = ("harmful", "benign", "lookalike")
REMEDY = "pass a JSONL file or a preset such as webdojo:PATH"


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


def read_records(path: str | Path) -> list[Record]:
    """Read records from JSONL. Errors name the file, the line and the field."""
    path = Path(path)
    known = {item.name for item in fields(Record)}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {REMEDY}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: not a UTF-8 JSONL file; {REMEDY}") from error
    records, seen = [], set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        for name in ("id", "instruction", "label"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f"{where}: field '{name}' is missing or not a non-empty string; add it")
        if row["label"] not in LABELS:
            raise UserError(f"{where}: field 'label' is {row['label']!r}; use one of {', '.join(LABELS)}")
        if row["id"] in seen:
            raise UserError(f"{where}: field 'id' repeats {row['id']!r}; ids must be unique")
        for name, value in row.items():
            wanted = dict if name == "evaluator" else str
            if name in known and not isinstance(value, wanted):
                kind = "JSON object" if wanted is dict else "string"
                raise UserError(f"{where}: field '{name}' must be a {kind}")
        seen.add(row["id"])
        records.append(Record(**{name: value for name, value in row.items() if name in known}))
    if not records:
        raise UserError(f"{path}: holds no records; write one JSON object a line")
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    atomic_write(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
