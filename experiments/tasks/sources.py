"""Where tasks and prompts come from, and in which environment each is carried out."""

from __future__ import annotations

from pathlib import Path

from pingscope.experiments.agents.rollout import AnyAction, Environment
from pingscope.experiments.models.organism import world
from pingscope.experiments.tasks.natural.environment import SITE, Pages
from pingscope.experiments.tasks.natural.families import SPLITS
from pingscope.experiments.tasks.natural.tasks import split_tasks
from pingscope.experiments.tasks.presets import load_tasks
from pingscope.experiments.tasks.records import LABELS, Record
from pingscope.experiments.tasks.rows import Skipped
from pingscope.interp.errors import UserError

STEPS = ("2", "3", "4")  # of an episode of the natural world
ORGANISM_SETS = (*world.SPLITS, "chat")


def read_tasks(spec: str, limit: int = 0, seed: int = 0, *, skipped: Skipped | None = None) -> list[Record]:
    """Records from a JSONL file or a preset; ``organism:SPLIT`` and ``organism:chat`` are the word game's.

    ``natural:SPLIT`` holds the tasks in ordinary English, 150 of every family and label; ``natural:SPLIT:N`` those of N
    steps alone.

    Args:
        limit: at most this many records per label, from the start of the file (0: all).
        skipped: takes rows that are bad; without, the first one ends the reading.
    """
    preset, _, rest = spec.partition(":")
    if preset == "organism":
        if rest not in ORGANISM_SETS:
            raise UserError(f"{spec}: unknown set {rest!r}; use organism: and one of {', '.join(ORGANISM_SETS)}")
        n = limit or 200
        return world.chat_instructions("train", n, seed) if rest == "chat" else world.tasks(rest, n=n, seed=seed)
    if preset == "natural":
        split, _, steps = rest.partition(":")
        if split not in SPLITS or steps not in ("", *STEPS):
            raise UserError(
                f"{spec}: unknown set {rest!r}; use natural: and one of {', '.join(SPLITS)}, alone or with the number "
                f"of steps behind it ({', '.join(STEPS)}): natural:test:2"
            )
        tasks = split_tasks(split, seed)
        return take([task for task in tasks if steps in ("", str(len(task.evaluator["screens"])))], limit)
    return take(load_tasks(spec, skipped), limit)


def take(records: list[Record], limit: int) -> list[Record]:
    """The first ``limit`` records of every label (0: all), labels in their fixed order."""
    groups = ([record for record in records if record.label == label] for label in LABELS)
    return [record for group in groups for record in (group[:limit] if limit else group)]


def environment_for(record: Record) -> Environment:
    """The rule-based environment a record names; without one, any valid action ends the task unjudged."""
    if record.evaluator.get("site") == SITE:
        return Pages(record.evaluator["screens"])
    return world.make_environment(record) if record.evaluator.get("site") else AnyAction(record)


def read_template(path: Path | None) -> str | None:
    """A chat template given as a file."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: chat template cannot be read; pass a text file") from error
    if "{" not in text:  # what is loaded takes a text without any for a path
        raise UserError(f"{path}: holds no Jinja template; give one that prints the messages")
    return text
