"""What no rate of a run rests on: rows that were not read, arms that could not be given, tasks without an outcome."""

from __future__ import annotations

from pingscope.schema import Results


def left_out(results: Results) -> str:
    """In sentences, to stand where the rates stand; empty where nothing is left out."""
    said = []
    if results.skipped:
        rows = "1 row of the task files" if results.skipped == 1 else f"{results.skipped} rows of the task files"
        said.append(f"Left out: {rows} could not be read.")
    for arm, reason in (results.impossible or {}).items():
        said.append(f"Not measured: {arm}, which this model cannot be given ({_ended(reason)})")
    missing = dict(results.missing or {})
    if results.search and results.search.missing:
        missing.setdefault("the search", results.search.missing)
        missing.pop("search", None)
    for arm, reasons in missing.items():
        kinds: dict[str, int] = {}
        for reason in reasons.values():
            kinds[reason] = kinds.get(reason, 0) + 1
        words = "; ".join(f"{many} × {reason}" for reason, many in kinds.items())
        tasks = "1 task has" if len(reasons) == 1 else f"{len(reasons)} tasks have"
        said.append(f"Missing from every rate of {arm}: {tasks} no outcome ({_ended(words)})")
    return " ".join(line if line.endswith(".") else f"{line}." for line in said)


def _ended(text: str) -> str:
    return text.rstrip(". ")
