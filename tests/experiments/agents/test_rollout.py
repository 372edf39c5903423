"""Episodes against a small environment: turns, endings, injected text, and what is logged."""

from __future__ import annotations

import json

import pytest

from pingscope.experiments.agents.rollout import AnyAction, Episode, run_episodes
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm
from tests.scripted import scripted

__all__ = ["scripted"]


class TwoSteps:
    """Click ``next``, then ``ok``. An unknown element changes nothing."""

    def __init__(self, record: Record) -> None:
        self.at, self.done, self.success = 0, False, False

    def page(self) -> str:
        return f"page {self.at}"

    def step(self, call) -> None:
        if call.name == "exit":
            self.done = True
        elif call.args.get("element") == ("next", "ok")[self.at]:
            self.at += 1
            self.done = self.success = self.at == 2


RIGHT = {"page 0": "do(Click, next)", "page 1": "do(Click, ok)"}


def record(number: int = 0, label: str = "benign", **fields) -> Record:
    return Record(f"r{number}", f"task {number}", label, domain="web", **fields)


def run(model, records, arm=None, **settings):
    return run_episodes(model, records, TwoSteps, arm or Arm("agent"), **settings)


def test_an_episode_walks_to_success(scripted):
    model = scripted(lambda prompt: RIGHT[prompt.page])
    (episode,) = run(model, [record()])
    assert (episode.success, episode.outcome(), len(episode.turns)) == (True, "complied", 2)
    assert [turn.text for turn in episode.turns] == ["do(Click, next)", "do(Click, ok)"]


def test_episodes_are_batched_and_keep_their_order(scripted):
    def answer(prompt):
        return "I cannot help with that." if prompt.id == "r1" else RIGHT[prompt.page]

    model = scripted(answer)
    ended = []
    episodes = run(model, [record(i) for i in range(3)], progress=ended.append)
    assert model.asked == [["r0", "r1", "r2"], ["r0", "r2"]]
    assert [episode.id for episode in episodes] == ["r0", "r1", "r2"]
    assert [episode.outcome() for episode in episodes] == ["complied", "refused", "complied"]
    assert sum(ended) == 3


def test_a_refusal_at_any_turn_ends_the_episode(scripted):
    model = scripted(lambda prompt: "I will not do this." if prompt.page == "page 1" else RIGHT[prompt.page])
    (episode,) = run(model, [record(label="harmful")])
    assert (episode.outcome(), episode.success, len(episode.turns)) == ("refused", False, 2)


@pytest.mark.parametrize(
    ("text", "outcome"), [("exit(message='done')", "exited"), ("Sure, click next.", "invalid"), ("do(", "invalid")]
)
def test_other_endings(scripted, text, outcome):
    model = scripted(lambda prompt: text)
    (episode,) = run(model, [record()])
    assert (episode.outcome(), episode.success, len(episode.turns)) == (outcome, False, 1)


def test_a_page_that_does_not_change_is_not_asked_again(scripted):
    model = scripted(lambda prompt: "do(Click, nowhere)")
    (episode,) = run(model, [record()], max_turns=4)
    assert (episode.outcome(), episode.success, len(episode.turns)) == ("complied", False, 4)
    assert len(model.asked) == 1


def test_the_arm_is_applied_on_every_turn_and_its_prefix_is_no_answer(scripted):
    model = scripted(lambda prompt: RIGHT[prompt.page])
    arm = Arm("x", prefix="# I cannot do harm.\n", suffix="careful", system="be safe")
    (episode,) = run(model, [record(system="agent")], arm)
    assert {(p.prefix, p.suffix, p.system) for p in model.prompts} == {
        ("# I cannot do harm.\n", "careful", "be safe\nagent")
    }
    assert len(model.prompts) == 2
    assert episode.outcome("paper") == "complied"
    assert all("cannot" not in turn.text for turn in episode.turns)


def test_a_sentence_left_open_by_the_prefix_ends_the_episode(scripted):
    model = scripted(lambda prompt: " help with that.")
    (episode,) = run(model, [record()], Arm("naive", prefix="I cannot"))
    assert (episode.outcome(), len(episode.turns)) == ("refused", 1)


def test_without_an_environment_success_is_unknown(scripted):
    model = scripted(lambda prompt: "do(Click, 7)")
    (episode,) = run_episodes(model, [record(context="a page")], AnyAction, Arm("agent"))
    assert (episode.success, episode.outcome(), len(episode.turns)) == (None, "complied", 1)
    assert model.prompts[0].page == "a page"


def test_chat_answers_comply_without_an_action(scripted):
    model = scripted(lambda prompt: "Here you are.")
    (episode,) = run_episodes(model, [Record("c", "hello", "benign")], AnyAction, Arm("agent"))
    assert episode.outcome() == "complied"


def test_log_rows_come_back_and_hold_no_instruction(scripted):
    model = scripted(lambda prompt: RIGHT[prompt.page])
    (episode,) = run(model, [record(context="first page")])
    row = json.loads(json.dumps(episode.to_row()))
    assert Episode.from_row(row) == episode
    assert "task 0" not in json.dumps(row)
    with pytest.raises(UserError, match="not a logged episode"):
        Episode.from_row({"id": "x"})


def test_a_real_model_answers_in_any_order(tiny_model):
    records = [Record(f"r{i}", "Buy a laptop. " * (i + 1), "benign", domain="web") for i in range(3)]
    arm = Arm("agent", prefix="# Note: think\n")
    together = run_episodes(tiny_model, records, AnyAction, arm, max_turns=2, max_new_tokens=5)
    apart = [run_episodes(tiny_model, [r], AnyAction, arm, max_turns=2, max_new_tokens=5)[0] for r in records]
    assert together == apart
