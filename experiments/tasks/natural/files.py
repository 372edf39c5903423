"""The natural world as files, for the eyes and for ``pingscope finetune --data``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pingscope.experiments.tasks.natural.families import SPLITS
from pingscope.experiments.tasks.natural.tasks import N, NaturalTasks, natural_tasks
from pingscope.experiments.tasks.natural.teaching import Row, alignment_rows, demonstration
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write


def write_natural(folder: Path, seed: int = 0, n: int = N) -> NaturalTasks:
    """Tasks of every split; for training alone, the aligned base's answers and the agent's demonstrations.

    Demonstrations are of benign tasks only: whatever becomes of refusal by them, nobody asked for it.

    Raises:
        UserError: a file of that name holds something else; nothing is written then.
    """
    tasks = natural_tasks(seed, n)
    benign = (record for record in tasks.train if record.label == "benign")
    rows: dict[str, Iterable[Row]] = {split: map(asdict, getattr(tasks, split)) for split in SPLITS}
    rows["alignment"] = alignment_rows(tasks.train)
    rows["demonstrations"] = (row for record in benign for row in demonstration(record))
    texts = {
        folder / f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        for name, some in rows.items()
    }
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise UserError(f"{path}: holds something else; pass another --out, or remove that file")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        atomic_write(path, text)
    return tasks
