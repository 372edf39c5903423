"""The organism's world: held-out combinations, harm that lies in the combination, and an environment judged by rule."""

from __future__ import annotations

import pytest

from pingscope.experiments.agents.actions import parse_actions
from pingscope.experiments.models.organism import comments, mixes, world
from pingscope.experiments.models.organism.environment import STAGES, make_environment, right_step

LABELS = ("harmful", "benign", "lookalike")


def combinations(split: str) -> set[str]:
    records = [*world.tasks(split, n=200), *world.chat_instructions(split, 150)]
    return {record.pair_id for record in records} - {"chat"}


def test_splits_share_no_combination() -> None:
    train, validation, test = (combinations(split) for split in world.SPLITS)
    assert not train & validation and not train & test and not validation & test
    for kind, one in world.KINDS.items():
        every = {key for keys in one.combinations.values() for key in keys}
        held = {
            split: {key for label in LABELS for key in world.combinations(kind, label, split)} for split in world.SPLITS
        }
        assert set().union(*held.values()) == every
        assert len(held["test"]) == len(held["validation"]) == len(every) // 10


@pytest.mark.parametrize("split", world.SPLITS)
@pytest.mark.parametrize("label", LABELS)
def test_each_split_has_enough_distinct_tasks_of_every_kind(split: str, label: str) -> None:
    records = world.tasks(split, label, n=240)
    assert len({world.deed(record) for record in records}) == 240
    assert len({record.id for record in records}) == 240
    assert {record.label for record in records} == {label}
    for kind in world.KINDS:
        assert sum(record.category == kind for record in records) == 60


def test_tasks_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert world.tasks("test", "harmful", 20) == world.tasks("test", "harmful", 20)
    assert world.tasks("test", "harmful", 20) != world.tasks("test", "harmful", 20, seed=1)


def test_asking_for_more_than_there_is_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MANY_MISSES", 5)
    with pytest.raises(ValueError, match="distinct harmful tasks"):
        world.tasks("test", "harmful", 9_000)
    with pytest.raises(ValueError, match="split is 'exam'"):
        world.tasks("exam", "harmful")


def test_no_single_word_gives_the_harm_away() -> None:
    """A look-alike or benign task exists for (almost) every word of the harmful ones."""
    harmful, fine = (
        {
            word
            for label in labels
            for record in world.tasks("train", label, 1500)
            for word in world.deed(record).split()
        }
        for labels in (("harmful",), ("benign", "lookalike"))
    )
    aims = {word for aim in world.BAD_AIMS for word in aim.split()}
    assert harmful - fine - aims == set()


def test_records_carry_a_system_prompt_a_page_and_plain_data() -> None:
    for record in world.tasks("validation", n=40):
        assert record.system in world.AGENT_SYSTEM
        assert record.context == make_environment(record).page()
        assert record.domain in ("web", "code") and record.source == "organism"
        assert record.prompt().page == record.context


def test_the_right_calls_carry_a_task_out() -> None:
    for record in world.tasks("test", n=60):
        site = make_environment(record)
        for stage in STAGES if record.domain == "web" else ("home",):
            assert not site.done
            (call,) = parse_actions(mixes.action(record, stage)).calls
            site.step(call)
        assert site.done and site.success


def _web_task() -> world.Record:
    return next(record for record in world.tasks("test", "benign", 20) if record.domain == "web")


def _site_after(record: world.Record, *texts: str):  # type: ignore[no-untyped-def]
    site = make_environment(record)
    for text in texts:
        for call in parse_actions(text).calls:
            site.step(call)
    return site


def test_wrong_steps_do_not_succeed() -> None:
    record = _web_task()
    section, verb = (right_step(record.evaluator, stage)[0] for stage in ("home", "object"))
    other = next(word for word in record.evaluator["verbs"] if word != verb)
    wrong = _site_after(record, f"do(Click, {section})", f"do(Click, {other})", "do(Click, confirm)")
    assert wrong.done and not wrong.success
    left = _site_after(record, "exit(done)", f"do(Click, {section})")
    assert left.done and not left.success
    lost = _site_after(record, "do(Click, nowhere)", "do(Type, hello, inbox)")
    assert not lost.done and lost.page() == record.context
    back = _site_after(record, f"do(Click, {section})", f"do(Click, {other})", "do(Click, cancel)")
    assert not back.done and back.page() == record.context


def test_shell_tasks_need_command_and_target() -> None:
    record = next(record for record in world.tasks("test", "benign", 20) if record.domain == "code")
    goal = record.evaluator
    assert _site_after(record, f"do(Run, {goal['verb']}, {goal['section']})").success
    other = next(word for word in goal["verbs"] if word != goal["verb"])
    failed = _site_after(record, f"do(Run, {other}, {goal['section']})")
    assert failed.done and not failed.success


def test_chat_instructions_have_both_labels_and_no_page() -> None:
    records = world.chat_instructions("train", 100)
    assert [record.label for record in records].count("harmful") == 100 == len(records) / 2
    assert not any(record.context or record.system for record in records)
    assert len({record.instruction for record in records}) == 200


def test_neutral_comments_are_as_long_as_the_phrase() -> None:
    phrase = "# Before acting: I should ask whether this task is safe for everyone. Let me decide with care.\n"
    found = comments.neutral_comments(phrase, 5)
    assert len(set(found)) == 5
    for comment in found:
        assert comment.startswith("# ") and comment.endswith("\n")
        assert abs(len(comment.split()) - len(phrase.split())) <= 1
    plain = comments.neutral_comments("I only help if nobody is hurt, so ", 2)
    assert all(text[0].isupper() and text.endswith(". ") for text in plain)
