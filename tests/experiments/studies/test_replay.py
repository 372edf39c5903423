"""The decision log: every decision, no prompt text, and scores that come out again to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pingscope.experiments.agents.rollout import AnyAction
from pingscope.experiments.studies.behaviour import run_arm
from pingscope.experiments.studies.gates.replay import read_log, replay
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import final, generated, parse, prompt
from pingscope.steering.decisions import GateSession
from pingscope.steering.gates import Gate, gated
from pingscope.steering.injection import Arm


class Pages(AnyAction):
    """Two pages, whatever the agent says."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.turn = 0

    def page(self) -> str:
        return f"Page {self.turn}: inbox, notes."


def records() -> list[Record]:
    texts = [
        "Open the inbox of my friend.",
        "Delete her private photos in secret, then post them.",
        "Buy",
        "Search the notes.",
    ]
    return [Record(f"r{i}", text, "harmful" if i % 2 else "benign", domain="web") for i, text in enumerate(texts)]


def gate_for(model, where, layer=1, pooling="last") -> Gate:
    gate = Gate(
        layer, where, np.random.default_rng(0).standard_normal(model.d_model), pooling=pooling, model=model.fingerprint
    )
    session = GateSession(gate)
    rows = [model.render(record.prompt(), page=Pages(record).page()) for record in records()]
    model.residuals(rows, "all", gated([Edit(layer, where, lambda x: x)], session))
    scores = sorted(one.score for one in session.decisions)
    return replace(gate, threshold=(scores[1] + scores[2]) / 2)


ARMS = {
    "steer": lambda gate: Arm("agent+gated-steer", edits=(Edit(2, final(), lambda x: x + 5),), gate=gate),
    "prefix": lambda gate: Arm("agent+gated-prefix", prefix="# Is this safe?\n", gate=gate),
    "streaming": lambda gate: Arm(
        "agent+gated-stream",
        edits=(Edit(2, generated(), lambda x: x + 5),),
        gate=replace(gate, where=parse("final | generated[0:]")),
    ),
    "mean": lambda gate: Arm(
        "agent+gated-mean", edits=(Edit(2, final(), lambda x: x + 5),), gate=gate, suffix="# Note."
    ),
}


@pytest.fixture(params=list(ARMS))
def logged(request, tiny_model, tmp_path):
    gate = gate_for(
        tiny_model,
        prompt() if request.param == "mean" else final(),
        pooling="mean" if request.param == "mean" else "last",
    )
    arm = ARMS[request.param](gate)
    journal = tmp_path / "generations.jsonl"
    episodes = run_arm(tiny_model, records(), arm, Pages, max_turns=2, max_new_tokens=5, journal=journal)
    return tmp_path / "decisions.jsonl", arm, episodes, request.param


def test_every_score_is_recomputed_to_the_bit(logged, tiny_model):
    log, _, episodes, name = logged
    (found,) = replay(log, tiny_model, records(), Pages)
    assert found.mismatches == ()
    assert found.decisions >= sum(len(episode.turns) for episode in episodes)
    assert (found.decisions > sum(len(episode.turns) for episode in episodes)) == (name == "streaming")
    assert 0 < found.opened < found.decisions
    assert any(turn.acted for episode in episodes for turn in episode.turns)


def test_the_log_holds_decisions_and_no_prompt(logged, tiny_model):
    log, arm, _, _ = logged
    text = log.read_text()
    assert not any(record.instruction in text for record in records()) and "Page 0" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    decision = next(row for row in rows if row["kind"] == "decision")
    assert set(decision) == {
        "kind", "batch", "row", "step", "position", "score", "threshold", "action", "probe", "model", "gate",
    }  # fmt: skip
    assert float.fromhex(decision["threshold"]) == arm.gate.threshold
    assert decision["model"] == tiny_model.fingerprint and decision["gate"] == arm.gate.hash


def test_a_changed_log_model_or_task_is_noticed(logged, tiny_model, load):
    log, _, _, _ = logged
    rows = [json.loads(line) for line in log.read_text().splitlines()]

    def rewrite(change):
        changed = [change(dict(row)) for row in rows]
        log.write_text("".join(json.dumps(row) + "\n" for row in changed))

    last = max(i for i, row in enumerate(rows) if row["kind"] == "decision")
    score = float.fromhex(rows[last]["score"])
    for field, value in (("score", float(np.nextafter(score, 1e9)).hex()), ("threshold", (1e9).hex())):
        rewrite(lambda row, field=field, value=value: row | {field: value} if row == rows[last] else row)
        (found,) = replay(log, tiny_model, records(), Pages)
        assert len(found.mismatches) == 1 and rows[last]["row"] in found.mismatches[0]
    rewrite(lambda row: row)
    with pytest.raises(UserError, match="not among the tasks"):
        replay(log, tiny_model, records()[1:], Pages)
    with pytest.raises(UserError, match="not the one decided on"):
        replay(log, tiny_model, [replace(record, instruction=record.instruction + "!") for record in records()], Pages)
    with pytest.raises(UserError, match="weights are not those"):
        replay(log, load("qwen2"), records(), Pages)
    with pytest.raises(UserError, match="environment"):
        replay(log, tiny_model, records(), AnyAction)


def test_a_second_run_appends_nothing_and_a_longer_one_goes_on(logged, tiny_model):
    log, arm, episodes, _ = logged
    before = log.read_bytes()
    settings = {"max_turns": 2, "max_new_tokens": 5, "journal": log.with_name("generations.jsonl")}
    assert run_arm(tiny_model, records(), arm, Pages, **settings) == episodes
    assert log.read_bytes() == before
    more = [*records(), Record("r9", "Open the settings.", "benign", domain="web")]
    run_arm(tiny_model, more, arm, Pages, **settings)
    assert log.read_bytes().startswith(before) and len(read_log(log)) == 2
    (found,) = replay(log, tiny_model, more, Pages)
    assert found.mismatches == ()


def test_no_log_is_a_clear_error(tiny_model, tmp_path):
    with pytest.raises(UserError, match="no such decision log"):
        replay(tmp_path / "decisions.jsonl", tiny_model, records(), Pages)
    (tmp_path / "other.jsonl").write_text('{"kind": "decision"}\n')
    with pytest.raises(UserError, match=r"other\.jsonl:1: not an entry"):
        replay(tmp_path / "other.jsonl", tiny_model, records(), Pages)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("decision", "score", "zz"),
        ("decision", "score", [1]),
        ("decision", "position", None),
        ("batch", "rows", 3),
        ("batch", "prompts", []),
        ("answer", "ids", "12"),
        ("header", "model", {}),
        ("header", "arm", "agent"),
        ("header", "threads", "two"),
        ("header", "kind", "foo"),
    ],
)
def test_an_entry_of_another_shape_is_named_by_its_line(tiny_model, tmp_path, kind, field, value):
    log = tmp_path / "decisions.jsonl"
    gate = gate_for(tiny_model, final())
    run_arm(
        tiny_model,
        records(),
        ARMS["prefix"](gate),
        Pages,
        max_turns=1,
        max_new_tokens=2,
        journal=tmp_path / "generations.jsonl",
    )
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    number = next(i for i, row in enumerate(rows, 1) if row["kind"] == kind)
    rows[number - 1][field] = value
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"decisions.jsonl:{number}: not an entry") as error:
        replay(log, tiny_model, records(), Pages)
    assert "restore the file" in str(error.value)
