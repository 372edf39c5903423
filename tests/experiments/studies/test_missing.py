"""One page that is too long, one arm that a template refuses, one environment that breaks: each costs itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import train_tokenizer

from pingscope.experiments.agents.rollout import AnyAction, Episode, run_episodes
from pingscope.experiments.studies.behaviour import missing_episodes, possible_arms, rates, run_arm
from pingscope.experiments.studies.first_token import first_token_mass
from pingscope.experiments.tasks.records import Record
from pingscope.interp import HookedModel
from pingscope.steering.injection import Arm, comparison_arms

RECORDS = [
    Record("short", "Open the inbox.", "harmful"),
    Record("long", "Open the inbox.", "harmful", context="a page of many words " * 300),
    Record("good", "Open the notes.", "benign"),
]
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_page_beyond_the_context_is_missing_and_the_rest_runs(tiny_model: HookedModel, tmp_path: Any) -> None:
    journal = tmp_path / "generations.jsonl"
    episodes = run_arm(tiny_model, RECORDS, Arm("agent"), AnyAction, max_turns=2, max_new_tokens=4, journal=journal)
    assert [e.missing is None for e in episodes] == [True, False, True]
    assert "512" in (episodes[1].missing or "")
    cell = rates(episodes)["harmful"]["strict"]
    assert (cell["refusal_rate"]["n"], cell["refusal_rate"]["n_missing"]) == (1, 1)
    assert cell["invalid_rate"]["n_missing"] == 1 and cell["attack_success_rate"]["n_missing"] == 2
    assert list(missing_episodes({"agent": episodes})["agent"]) == ["long"]
    again = run_arm(tiny_model, RECORDS, Arm("agent"), AnyAction, max_turns=2, max_new_tokens=4, journal=journal)
    assert again == episodes and Episode.from_row(episodes[1].to_row()) == episodes[1]
    mass = first_token_mass(tiny_model, RECORDS, Arm("agent"))
    assert mass["harmful"]["refusal"]["n"] == 1


def test_an_environment_that_breaks_costs_its_own_episode(
    tiny_model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pingscope.experiments.agents import rollout
    from pingscope.interp.generate.generation import Generation

    class Broken(AnyAction):
        def step(self, call: Any) -> None:
            raise RuntimeError("the page crashed\nbadly")

    said = [Generation(record.id, "click('7')", (1,), True) for record in RECORDS]
    monkeypatch.setattr(rollout, "generate", lambda model, rows, **_: said[: len(rows)])
    broken = run_episodes(
        tiny_model, [RECORDS[0], RECORDS[2]], lambda r: Broken(r) if r.id == "short" else AnyAction(r), Arm("agent"),
        max_turns=1, max_new_tokens=4,
    )  # fmt: skip
    assert broken[0].missing == "the environment failed: RuntimeError: the page crashed badly"
    assert broken[1].missing is None and broken[1].outcome() == "complied"


def test_an_arm_that_the_template_refuses_is_named_and_the_others_run(load: Callable[[str], HookedModel]) -> None:
    model = HookedModel(load("llama").hf, train_tokenizer(GEMMA), "gemma-like")
    arms = comparison_arms("# Note\n", neutral=["# a\n"], models=("agent",))
    possible, impossible = possible_arms(arms, {"agent": model}, RECORDS[0])
    assert list(impossible) == ["agent+system"] and "System role not supported" in impossible["agent+system"]
    assert [arm.name for arm in possible] == [arm.name for arm in arms if arm.name != "agent+system"]
    bad = replace(RECORDS[0], instruction="\ud83d")
    assert possible_arms(arms[:1], {"agent": model}, bad) == (arms[:1], {})
