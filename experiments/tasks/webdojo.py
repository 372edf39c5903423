"""WebDojo's released goals with their first pages: an agent's inputs as the paper's probes read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.rows import Row, Skipped, each, json_rows, text_of
from pingscope.interp.errors import UserError

LEAD = "Task Instruction:"
MAX_TEXT = 500  # characters of one text node, as in the released observations
KINDS = {"harmful": "unsafe", "benign": "safe"}

# Layout boxes and the copy of an element's text: nothing an agent acts on.
_DROPPED = re.compile(r"""\s+data-(?:bbox|text)=(?:"[^"]*"|'[^']*')""")
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TEXT = re.compile(r"(?<=>)[^<]+")


def load_webdojo(path: Path, skipped: Skipped | None = None, *, raw: bool = False) -> list[Record]:
    """Records of ``webagent_input_{harmful,benign}.json``, with criteria from ``tasks_*_raw.json`` where they are.

    The two released files disagree about a few goals: those records keep the input file's goal and have no criteria.

    Args:
        path: the folder, or one of the two input files.
        raw: keep the pages as released instead of simplifying them.
    """
    records: list[Record] = []
    for label, category in KINDS.items():
        inputs = path / f"webagent_input_{label}.json" if path.is_dir() else path
        if not path.is_dir() and label not in path.name:
            continue
        if not inputs.exists():
            raise UserError(f"{inputs}: no such file; give the folder that holds webagent_input_harmful.json")
        tasks = _tasks(inputs.with_name(f"tasks_{label}_raw.json"), category)

        def make(item: tuple[int, tuple[str, Row]], label: str = label, tasks: dict[str, Any] = tasks) -> list[Record]:
            i, (where, row) = item
            goal = text_of(row, "goal", where).removeprefix(LEAD).strip()
            html = text_of(row, "html", where)
            task = tasks.get(goal, {})
            name = task.get("scenario_id") or f"{label}-{i}"
            site = str(task.get("webpage") or "").split("/")[0]
            rules = {"kind": "webdojo", "criteria": task["criteria"]} if task else {}
            page = html if raw else simplify(html)
            split = str(task.get("split") or "")
            return [Record(f"webdojo-{name}", goal, label, site, "web", "webdojo", split, page, evaluator=rules)]

        records += each(enumerate(json_rows(inputs, None, skipped)), make, skipped)
    if not records:
        raise UserError(f"{path}: the name holds neither harmful nor benign; give the folder or an input file")
    return records


def simplify(html: str) -> str:
    """A page as an agent reads it: no scripts, comments and layout; ids of interactive elements stay."""
    html = _DROPPED.sub("", _HIDDEN.sub("", html))
    html = _TEXT.sub(lambda text: _cut(text[0]), html)
    return re.sub(r"\s+", " ", html).strip()


def _cut(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " "


def _tasks(path: Path, category: str) -> dict[str, dict[str, Any]]:
    """Task rows by goal: the input files carry no id to join on."""
    tasks: dict[str, dict[str, Any]] = {}
    if path.exists():
        for where, row in json_rows(path):
            if not isinstance(row.get("criteria"), list):
                raise UserError(f"{where}: field 'criteria' is missing or not a list; get a fresh copy")
            if row.get("category") != category:
                raise UserError(f"{where}: field 'category' is not {category!r}; get a fresh copy")
            tasks.setdefault(text_of(row, "goal", where), row)
    return tasks
