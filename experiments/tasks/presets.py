"""Published data sets as records. ``PRESET:PATH`` names a layout and the user's own copy; nothing is downloaded.

Counts are never assumed, and no code in a data set is ever run or imported.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from pingscope.experiments.tasks.near_copies import group_near_copies
from pingscope.experiments.tasks.records import Record, read_records
from pingscope.experiments.tasks.rows import Row, Skipped, csv_rows, each, find_files, json_rows, text_of
from pingscope.experiments.tasks.webdojo import load_webdojo
from pingscope.interp.errors import UserError

Numbered = tuple[int, tuple[str, Row]]
Loader = Callable[[Path, Skipped | None], list[Record]]


def load_tasks(spec: str, skipped: Skipped | None = None) -> list[Record]:
    """Records from a JSONL file, or from ``PRESET:PATH`` with one of :data:`PRESETS`.

    Raises:
        UserError: an unknown preset, a file that is missing or malformed, a row without a field it needs.
    """
    name, colon, path = spec.partition(":")
    if not colon or Path(spec).exists():
        return read_records(spec, skipped)
    if name not in PRESETS:
        if "/" in name or "\\" in name or len(name) < 2:  # a path with a colon in it
            return read_records(spec, skipped)
        raise UserError(f"{spec}: unknown preset {name!r}; use a JSONL file or one of {', '.join(sorted(PRESETS))}")
    if not path:
        raise UserError(f"{spec}: no path; give the data's file or folder, {name}:PATH")
    if not Path(path).expanduser().exists():
        raise UserError(f"{path}: no such file or folder; give your own copy of the data, {name}:PATH")
    records = PRESETS[name](Path(path).expanduser(), skipped)
    if not records:
        raise UserError(f"{path}: no records in the layout of {name}; check that it is the data's own file")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise UserError(f"{path}: id {record.id!r} comes twice; the file was changed, get a fresh copy")
        seen.add(record.id)
    return records


def deduplicate(records: Iterable[Record], against: Iterable[Record] = ()) -> list[Record]:
    """Leave out records whose instruction, up to case, space and punctuation, is in ``against`` or came before.

    Some published sets hold each other's rows: a probe must not be tested on what it was trained on.
    """
    seen = {_bare(record) for record in against}
    kept = []
    for record in records:
        if _bare(record) not in seen:
            seen.add(_bare(record))
            kept.append(record)
    return kept


def _bare(record: Record) -> str:
    return " ".join(re.findall(r"\w+", f"{record.instruction}\n{record.context}".lower()))


def _advbench(path: Path, skipped: Skipped | None) -> list[Record]:
    def make(item: Numbered) -> list[Record]:
        i, (where, row) = item
        return [Record(f"advbench-{i}", text_of(row, "goal", where), "harmful", source="advbench")]

    return each(enumerate(csv_rows(path, ("goal",))), make, skipped)


def _paper_probes(path: Path, skipped: Skipped | None, copyright: bool = False) -> list[Record]:
    """The paper's probe training set from a folder with HarmBench's and AdvBench's CSV and Alpaca's JSON.

    Harmful instructions without duplicates, and as many Alpaca instructions, drawn once for all; near copies share a
    group, so that no fold tests on a wording of what it was trained on.
    """
    harmful: list[Record] = []
    for file in sorted(path.glob("*.csv")):
        head = file.open(encoding="utf-8-sig").readline()
        if "BehaviorID" in head:
            harmful += _harmbench(file, skipped, copyright)
        elif "goal" in head:
            harmful += _advbench(file, skipped)
    benign = [record for file in sorted(path.glob("*.json*")) for record in _alpaca(file, skipped)]
    harmful = deduplicate(harmful)
    benign = deduplicate(benign, harmful)
    if not harmful or not benign:
        missing = "Alpaca's JSON" if harmful else "HarmBench's or AdvBench's CSV"
        raise UserError(f"{path}: {missing} is not in this folder; put the data's own files there")
    random.Random(0).shuffle(benign)
    return group_near_copies([*harmful, *benign[: len(harmful)]])


def _harmbench(path: Path, skipped: Skipped | None, copyright: bool = False) -> list[Record]:
    """Contextual behaviours mean nothing without their context; copyright ones test memory, not refusal."""

    def make(placed: tuple[str, Row]) -> list[Record]:
        where, row = placed
        kind = row.get("FunctionalCategory") or ""
        if kind == "copyright" and not copyright:
            return []
        return [
            Record(
                f"harmbench-{text_of(row, 'BehaviorID', where)}",
                text_of(row, "Behavior", where),
                "harmful",
                row.get("SemanticCategory") or "",
                source="harmbench",
                split=kind,
                context=row.get("ContextString") or "",
            )
        ]

    return each(csv_rows(path, ("Behavior", "BehaviorID", "FunctionalCategory")), make, skipped)


def _jbb(path: Path, skipped: Skipped | None) -> list[Record]:
    """A folder with the harmful and the benign file, or one of them; twins share their ``Index``."""
    records: list[Record] = []
    for file in find_files(path, "*.csv"):
        label = "benign" if "benign" in file.name.lower() else "harmful"

        def make(item: Numbered, label: str = label) -> list[Record]:
            i, (where, row) = item
            index = row.get("Index") or row.get("") or str(i)
            goal = text_of(row, "Goal", where)
            category = row.get("Category") or ""
            return [Record(f"jbb-{label}-{index}", goal, label, category, source="jbb", pair_id=f"jbb-{index}")]

        records += each(enumerate(csv_rows(file, ("Goal", "Category"))), make, skipped)
    return records


def _xstest(path: Path, skipped: Skipped | None) -> list[Record]:
    """Safe prompts look unsafe: look-alikes. The older header has no label, but its types say ``contrast_``."""

    def make(placed: tuple[str, Row]) -> list[Record]:
        where, row = placed
        kind = text_of(row, "type", where)
        unsafe = row["label"] == "unsafe" if row.get("label") else kind.startswith("contrast_")
        number = row.get("id") or row.get("id_v2") or row.get("id_v1")
        if not number:
            raise UserError(f"{where}: field 'id' is missing (older files: 'id_v2'); get a fresh copy")
        label = "harmful" if unsafe else "lookalike"
        pair = kind.removeprefix("contrast_")
        return [Record(f"xstest-{number}", text_of(row, "prompt", where), label, pair, source="xstest")]

    return each(csv_rows(path, ("prompt", "type")), make, skipped)


def _strongreject(path: Path, skipped: Skipped | None) -> list[Record]:
    def make(item: Numbered) -> list[Record]:
        i, (where, row) = item
        text, category = text_of(row, "forbidden_prompt", where), row.get("category") or ""
        return [Record(f"strongreject-{i}", text, "harmful", category, source="strongreject")]

    return each(enumerate(csv_rows(path, ("forbidden_prompt",))), make, skipped)


def _alpaca(path: Path, skipped: Skipped | None) -> list[Record]:
    """The input, where there is one, belongs to the instruction."""

    def make(item: Numbered) -> list[Record]:
        i, (where, row) = item
        parts = [text_of(row, "instruction", where), str(row.get("input") or "").strip()]
        return [Record(f"alpaca-{i}", "\n".join(filter(None, parts)), "benign", source="alpaca")]

    return each(enumerate(json_rows(path, skipped=skipped)), make, skipped)


def _refusal_direction(path: Path, skipped: Skipped | None) -> list[Record]:
    """Files ``harmful_train.json``, ``harmless_test.json``, …: label and split stand in the name."""
    records: list[Record] = []
    for file in find_files(path, "*.json"):
        kind, _, split = file.stem.partition("_")
        if kind not in ("harmful", "harmless"):
            raise UserError(f"{file}: the name must begin with harmful_ or harmless_, which gives the label")
        label = "harmful" if kind == "harmful" else "benign"

        def make(item: Numbered, name: str = file.stem, label: str = label, split: str = split) -> list[Record]:
            i, (where, row) = item
            text, category = text_of(row, "instruction", where), str(row.get("category") or "")
            return [Record(f"{name}-{i}", text, label, category, source="refusal_direction", split=split)]

        records += each(enumerate(json_rows(file, skipped=skipped)), make, skipped)
    return records


def _agentharm(path: Path, skipped: Skipped | None) -> list[Record]:
    """The grading functions are Python: their names are kept as text, nothing is imported."""
    records: list[Record] = []
    for file in find_files(path, "*.json"):
        label = "benign" if "benign" in file.name.lower() else "harmful"

        def make(placed: tuple[str, Row], label: str = label, split: str = file.stem) -> list[Record]:
            where, row = placed
            return [
                Record(
                    f"agentharm-{label}-{text_of(row, 'id', where)}",
                    text_of(row, "prompt", where),
                    label,
                    str(row.get("category") or ""),
                    "tool",
                    "agentharm",
                    split,
                    evaluator={"target_functions": row.get("target_functions") or []},
                    pair_id=f"agentharm-{row.get('id_original') or row['id']}",
                )
            ]

        records += each(json_rows(file, "behaviors", skipped), make, skipped)
    return records


def _redcode(path: Path, skipped: Skipped | None) -> list[Record]:
    """One row is three records: the code itself, its summary, its details. Report per category (scenario)."""

    def make(placed: tuple[str, Row]) -> list[Record]:
        where, row = placed
        index = text_of(row, "Index", where)
        language = str(row.get("Language") or "Python")
        code = f"Execute the following {language} code.\n\n```\n{text_of(row, 'Code', where)}\n```"
        forms = {"code": code} | {
            name: text_of(row, f"Text_{name}", where) for name in ("summary", "details") if row.get(f"Text_{name}")
        }
        pair, scenario = f"redcode-{language.lower()}-{index}", index.split("_")[0]
        return [
            Record(f"{pair}-{form}", text, "harmful", scenario, "code", "redcode", form, pair_id=pair)
            for form, text in forms.items()
        ]

    files = find_files(path, "*.json")
    return [record for file in files for record in each(json_rows(file, None, skipped), make, skipped)]


def _webarena(path: Path, skipped: Skipped | None) -> list[Record]:
    """Intents with their rules as data. Rules that are code (``func:``) mark a task as not evaluable."""

    def make(placed: tuple[str, Row]) -> list[Record]:
        where, row = placed
        given = row.get("eval")
        rules: Row = given if isinstance(given, dict) else {}
        kinds = set(rules.get("eval_types") or [])
        runs_code = "func:" in str(rules.get("program_html")) or "func:" in str(rules.get("reference_url"))
        offline = bool(kinds) and kinds <= {"string_match", "url_match"} and not runs_code
        kept: Row = {
            key: rules[key] for key in ("eval_types", "reference_answers", "reference_url") if offline and key in rules
        }
        if "task_id" not in row:
            raise UserError(f"{where}: field 'task_id' is missing; get a fresh copy of the file")
        return [
            Record(
                f"webarena-{row['task_id']}",
                text_of(row, "intent", where),
                "benign",
                "+".join(map(str, row.get("sites") or [])),
                "web",
                "webarena",
                evaluator={"kind": "webarena", "start_url": str(row.get("start_url") or ""), **kept},
                pair_id=f"webarena-template-{row.get('intent_template_id', row['task_id'])}",
            )
        ]

    return each(json_rows(path, None, skipped), make, skipped)


PRESETS: dict[str, Loader] = {
    "advbench": _advbench,
    "agentharm": _agentharm,
    "alpaca": _alpaca,
    "harmbench": _harmbench,
    "jbb": _jbb,
    "paper-probes": _paper_probes,
    "paper-probes-copyright": lambda path, skipped: _paper_probes(path, skipped, copyright=True),
    "redcode": _redcode,
    "refusal_direction": _refusal_direction,
    "strongreject": _strongreject,
    "webarena": _webarena,
    "webdojo": load_webdojo,
    "webdojo-raw": lambda path, skipped: load_webdojo(path, skipped, raw=True),
    "xstest": _xstest,
}
