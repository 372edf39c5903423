"""The files that ship as examples are read by the commands they are for."""

from __future__ import annotations

from pathlib import Path

from pingscope.experiments.tasks.conversations import read_conversations
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import read_records

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_the_examples_are_read_and_their_splits_do_not_overlap() -> None:
    sets = {name: read_records(EXAMPLES / f"{name}.jsonl") for name in ("probe", "tasks", "validation")}
    for records in sets.values():
        assert len(records) == 10 and {"harmful", "benign"} <= {record.label for record in records}
    assert len(deduplicate(sets["validation"], sets["tasks"])) == 10
    talks = read_conversations(EXAMPLES / "demonstrations.jsonl")
    assert len(talks) == 10 and all(talk.turns[-1].role == "assistant" for talk in talks)
