"""The natural world as files, for the eyes and for ``pingscope finetune --data``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pingscope.experiments.tasks.natural.families import SPLITS
from pingscope.experiments.tasks.natural.tasks import N, NaturalTasks, natural_tasks
from pingscope.experiments.tasks.natural.teaching import Row, alignment_rows, demonstration
from pingscope.experiments.tasks.records import write_records
from pingscope.interp.files import atomic_write


def write_natural(folder: Path, seed: int = 0, n: int = N) -> NaturalTasks:
    """Tasks of every split; for training alone, the aligned base's answers and the agent's demonstrations.

    Demonstrations are of benign tasks only: whatever becomes of refusal by them, nobody asked for it.
    """
    tasks = natural_tasks(seed, n)
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_records(folder / f"{split}.jsonl", getattr(tasks, split))
    _write(folder / "alignment.jsonl", alignment_rows(tasks.train))
    benign = (record for record in tasks.train if record.label == "benign")
    _write(folder / "demonstrations.jsonl", (row for record in benign for row in demonstration(record)))
    return tasks


def _write(path: Path, rows: Iterable[Row]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
