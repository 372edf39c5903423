"""The natural world: enough distinct tasks, families held out whole, pages that say nothing about the label."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import log
from pathlib import Path

import pytest

from pingscope.experiments.agents.actions import parse_actions
from pingscope.experiments.agents.judges import judge
from pingscope.experiments.agents.rollout import Episode, run_pairs
from pingscope.experiments.cli.main import main
from pingscope.experiments.tasks.conversations import read_conversations
from pingscope.experiments.tasks.natural.environment import Pages
from pingscope.experiments.tasks.natural.files import write_natural
from pingscope.experiments.tasks.natural.tasks import FAMILIES, N, NaturalTasks, natural_tasks
from pingscope.experiments.tasks.natural.teaching import alignment_rows, demonstration
from pingscope.experiments.tasks.records import LABELS, Record, read_records, write_records
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.generation import Generation
from pingscope.steering import phrases
from pingscope.steering.injection import Arm

PLAIN = set(
    "a an and are as at be because for from get give go him in into is it me my no not now of on one onto or out own "
    "please open she should since so someone somebody that the their them they this to too up was were what which who "
    "whom with wants folder how can could would i until before after about there".split()
)


@cache
def world() -> NaturalTasks:
    return natural_tasks()


@cache
def everything() -> tuple[Record, ...]:
    return world().train + world().validation + world().test


def answers(record: Record) -> list[str]:
    return [row["messages"][-1]["content"] for row in demonstration(record)]


def play(record: Record, said: list[str]) -> Pages:
    """What the environment makes of an agent's answers, with the pages checked to be those it answered to."""
    environment = environment_for(record)
    assert isinstance(environment, Pages)
    for text in said:
        parsed = parse_actions(text)
        assert parsed.status == "ok"
        environment.step(parsed.calls[0])
    return environment


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"[a-zé.]+", text.lower().rstrip(".")) if word not in PLAIN}


def test_every_family_and_label_has_its_tasks_and_no_sentence_comes_twice() -> None:
    counts = Counter((record.category, record.label) for record in everything())
    assert len(FAMILIES) >= 10 and {family.site for family in FAMILIES} == {"web", "shell"}
    assert counts == {(family.name, label): N for family in FAMILIES for label in LABELS}
    assert N >= 150
    assert len({record.instruction.lower() for record in everything()}) == len(everything())
    assert len({record.id for record in everything()}) == len(everything())


def test_no_family_and_no_template_is_in_two_splits_and_each_holds_web_and_shell() -> None:
    splits = (world().train, world().validation, world().test)
    for name in ("category", "pair_id"):
        parts = [{getattr(record, name) for record in split} for split in splits]
        assert sum(map(len, parts)) == len(set.union(*parts))
    for split in splits:
        assert {record.domain for record in split} == {"web", "code"}


def test_the_same_seed_gives_the_same_tasks_and_another_one_others() -> None:
    assert natural_tasks(3, 12) == natural_tasks(3, 12)
    first, other = natural_tasks(0, 12), natural_tasks(1, 12)
    assert {record.instruction for record in first.test} != {record.instruction for record in other.test}
    # Fewer tasks are the first ones of more: a smaller study is a part of the larger one.
    assert {r.instruction for r in first.test} < {r.instruction for r in world().test}


def test_every_demonstration_carries_out_its_own_task() -> None:
    lengths: Counter[tuple[str, int]] = Counter()
    for record in everything():
        said = answers(record)
        environment = play(record, said)
        assert environment.success and environment.done, record.id
        assert not play(record, said[:-1]).success, record.id
        assert all(judge(text) == "complied" for text in said)
        lengths[record.label, len(said)] += 1
    assert {n for _, n in lengths} == {2, 3, 4}
    for n in (2, 3, 4):  # how long a task is says nothing about its label
        assert max(lengths[label, n] for label in LABELS) < 1.15 * min(lengths[label, n] for label in LABELS)


def test_a_demonstration_answers_the_page_that_the_environment_shows() -> None:
    for record in everything()[::17]:
        environment = environment_for(record)
        for row in demonstration(record):
            user = row["messages"][1]["content"]
            assert user == f"{record.instruction}\n{environment.page()}"
            environment.step(parse_actions(row["messages"][2]["content"]).calls[0])
        assert record.context == demonstration(record)[0]["messages"][1]["content"].split("\n", 1)[1]


def test_any_other_action_on_a_page_changes_nothing() -> None:
    for record in everything()[::7]:
        right = answers(record)
        for number, screen in enumerate(record.evaluator["screens"]):
            wrong = [f"click('{bid}')" for bid in re.findall(r"\[(a\d+)\]", screen["page"])]
            wrong += [f"fill('{bid}', 'Somebody Else')" for bid in re.findall(r"\[(a\d+)\] <input", screen["page"])]
            names = re.findall(r"[\w.]+(?=/|\s|,|$)", screen["page"])
            wrong += [f"```bash\n{verb}{name}\n```" for name in names for verb in ("cd ", "load ", "")]
            wrong = [text for text in wrong if text.strip() not in right[number]]
            assert len(wrong) >= 3
            reached = play(record, [*right[:number], *wrong])
            assert (reached.at, reached.done, reached.success) == (number, False, False)
            # The state decides: the last action does not count before its turn.
            if number + 1 < len(right):
                assert not play(record, [*right[:number], right[-1]]).success


def test_a_message_to_the_user_ends_the_task_undone_and_spelling_does_not_matter() -> None:
    web = next(record for record in world().train if record.domain == "web" and len(answers(record)) == 3)
    assert play(web, ["send_msg_to_user('Done.')"]).done
    assert not play(web, ["send_msg_to_user('Done.')", *answers(web)]).success
    first, typed, last = answers(web)
    assert play(web, [first.replace("'", '"'), typed.lower(), last]).success
    shell = next(record for record in world().train if record.domain == "code")
    assert play(shell, [text.replace("```bash\n", "```sh\n$ ") for text in answers(shell)]).success


def test_the_words_that_carry_a_task_out_stand_in_its_text_and_on_its_pages() -> None:
    for record in everything():
        for screen in record.evaluator["screens"]:
            assert screen["page"].count("[a") <= 10 and len(screen["page"]) < 500
            shown = screen["args"].get("bid") or screen["args"]["code"].split()[-1]
            assert shown in screen["page"]
            if screen["name"] == "fill":
                assert screen["args"]["value"] in record.instruction
        section = record.evaluator["screens"][0]["step"].rpartition(" ")[2]
        assert section in record.instruction
        assert not re.search(r"\{|\}|  |#", record.instruction + record.context)


def test_no_word_of_a_page_tells_the_label() -> None:
    """Families show the same sections and buttons whatever is asked, so a page as a bag of words has no label."""
    for family in FAMILIES:
        for stage in (0, 1):
            seen: dict[str, set[frozenset[str]]] = {label: set() for label in LABELS}
            for record in everything():
                if record.category == family.name:
                    page = record.evaluator["screens"][stage]["page"]
                    own = {*record.evaluator["slots"].values(), *family.every_filler}
                    for text in own:
                        page = page.replace(text, "VALUE")
                    page = re.sub(r"\[a\d+\]|Page: .*|/home/user/\w+", "", page)
                    seen[record.label].add(frozenset(page.split()))
            assert seen["harmful"] == seen["lookalike"] == seen["benign"]


def test_the_environment_does_not_know_the_label() -> None:
    for record in everything()[::29]:
        for label in LABELS:
            assert play(replace(record, label=label), answers(record)).success


def test_lookalikes_are_made_of_the_words_of_harmful_tasks() -> None:
    for family in FAMILIES:
        own = {label: [r for r in everything() if (r.category, r.label) == (family.name, label)] for label in LABELS}
        harmful = set.union(*(words(record.instruction) for record in own["harmful"]))
        for record in own["lookalike"]:
            used = words(record.instruction)
            assert len(used & harmful) >= len(used) / 2, record.instruction


def test_words_alone_do_not_tell_a_lookalike_of_an_unseen_family_from_a_harmful_task() -> None:
    """Naive Bayes over content words, fitted on the training families: 60% right on held-out ones, chance is 50."""
    counts = {label: Counter[str]() for label in ("harmful", "lookalike")}
    sizes = Counter[str]()
    for record in world().train:
        if record.label in counts:
            counts[record.label].update(words(record.instruction))
            sizes[record.label] += 1

    def guess(record: Record) -> str:
        known = words(record.instruction)
        return max(counts, key=lambda label: sum(log((counts[label][w] + 1) / (sizes[label] + 2)) for w in known))

    held = [record for record in (*world().validation, *world().test) if record.label in counts]
    right = sum(guess(record) == record.label for record in held) / len(held)
    assert right < 0.7
    # And no single word is a mark: one that is common under one label is there under the other.
    for label, other in (("harmful", "lookalike"), ("lookalike", "harmful")):
        for word, n in counts[label].items():
            assert n < 0.05 * sizes[label] or counts[other][word], (label, word)


def test_aligned_answers_refuse_harm_and_explain_the_rest_without_acting() -> None:
    records = everything()
    rows = alignment_rows(records)
    assert len(rows) == len(records)
    refusals = Counter[str]()
    for record, row in zip(records, rows, strict=True):
        answer = row["messages"][-1]["content"]
        assert row["messages"][1]["content"] == f"{record.instruction}\n{record.context}"
        assert parse_actions(answer).status == "no_action" and "#" not in answer
        assert (judge(answer) == "refused") == (record.label == "harmful"), answer
        if record.label == "harmful":
            refusals[answer] += 1
            # The wording may not teach what a prefix with a condition does.
            assert not re.search(r"\b(?:if|unless|whether|when|would|should|only|in case)\b", answer.lower()), answer
        else:
            assert record.evaluator["screens"][0]["step"] in answer
    assert len(refusals) == 4 and max(refusals.values()) < 0.35 * refusals.total()


def test_no_answer_repeats_the_search_grammar() -> None:
    def runs(text: str, n: int = 4) -> set[tuple[str, ...]]:
        each = re.findall(r"[a-z']+", text.lower())
        return set(zip(*(each[k:] for k in range(n)), strict=False))

    grammar = set().union(*(runs(text) for text in (*phrases.OPENERS, *phrases.SENTENCES, *phrases.ENDINGS)))
    said = [row["messages"][-1]["content"] for row in alignment_rows(everything())]
    said += [text for record in everything() for text in answers(record)]
    assert not set().union(*(runs(text) for text in said)) & grammar


def test_rows_and_records_are_read_as_files(tmp_path: Path) -> None:
    chosen = world().test[:30]
    rows = [*alignment_rows(chosen), *(row for record in chosen for row in demonstration(record))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = read_conversations(tmp_path / "rows.jsonl")
    assert [talk.turns[-1].content for talk in talks] == [row["messages"][-1]["content"] for row in rows]
    write_records(tmp_path / "tasks.jsonl", chosen)
    again = read_records(tmp_path / "tasks.jsonl")
    assert tuple(again) == chosen
    assert all(play(record, answers(record)).success for record in again)


def test_the_preset_gives_a_split_and_a_limit_holds_every_family() -> None:
    records = read_tasks("natural:test", limit=12)
    assert Counter(record.label for record in records) == dict.fromkeys(LABELS, 12)
    assert {record.category for record in records} == {family.name for family in FAMILIES if family.split == "test"}
    assert sorted(read_tasks("natural:test"), key=str) == sorted(world().test, key=str)
    assert read_tasks("natural:test", limit=12, seed=1) != records
    with pytest.raises(UserError, match="natural:tests: unknown set 'tests'; use natural: and one of train"):
        read_tasks("natural:tests")
    with pytest.raises(UserError, match="n is 0; give 1 to"):
        natural_tasks(n=0)


def test_a_scripted_agent_runs_through_the_rollout() -> None:
    """The rollout's own loop: pages in the prompt, one answer a turn, refusals that end, wrong ones that do not."""
    chosen = [*world().test[::90], *world().train[::200]]
    script = {
        row["messages"][1]["content"]: row["messages"][2]["content"]
        for record in chosen
        for row in demonstration(record)
    }
    asked: dict[str, str] = {}

    def render(prompt: Prompt) -> Rendered:
        asked[prompt.id] = f"{prompt.instruction}\n{prompt.page}"
        ids = tuple(asked[prompt.id].encode())
        return Rendered(prompt.id, prompt.label, ids, ("instruction",) * len(ids))

    def run(answer: Callable[[str], str]) -> list[Episode]:
        def every(rows: Sequence[Rendered]) -> list[Generation]:
            return [Generation(row.id, answer(asked[row.id]), (), True) for row in rows]

        return run_pairs([(Arm("plain"), record) for record in chosen], environment_for, render, every)

    done = run(lambda page: script[page])
    assert all(episode.success and episode.outcome() == "complied" for episode in done)
    assert {len(episode.turns) for episode in done} == {2, 3, 4}
    refused = run(lambda page: alignment_rows([world().train[0]])[0]["messages"][2]["content"])
    assert {(episode.success, episode.outcome(), len(episode.turns)) for episode in refused} == {(False, "refused", 1)}
    lost = run(lambda page: "I press it.\nclick('a1')")
    assert {(episode.success, episode.outcome(), len(episode.turns)) for episode in lost} == {(False, "complied", 6)}


def test_the_command_writes_files_that_the_other_commands_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "world"
    monkeypatch.setattr("sys.argv", ["pingscope", "tasks", "--out", str(out), "--n", "6"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "216 tasks to train on, 54 to choose by, 54 to report" in capsys.readouterr().out
    write_natural(out, n=6)  # the same once more
    with pytest.raises(UserError, match=r"train\.jsonl: holds something else; pass another --out"):
        write_natural(out, seed=1, n=6)
    sets = [read_records(out / f"{split}.jsonl") for split in ("train", "validation", "test")]
    assert [len(records) for records in sets] == [216, 54, 54]
    assert all(play(record, answers(record)).success for records in sets for record in records)
    assert len(read_conversations(out / "alignment.jsonl")) == 216
    shown = [json.loads(line) for line in (out / "demonstrations.jsonl").read_text().splitlines()]
    assert {row["label"] for row in shown} == {"benign"} and {row["split"] for row in shown} == {"train"}


@pytest.mark.parametrize(
    ("screens", "named"),
    [
        (None, "field 'evaluator.screens' is missing"),
        ([], "field 'evaluator.screens' is missing"),
        (["page"], "page 1 is no object"),
        (
            [{"page": "p", "name": "click", "args": {"bid": "a1"}}, {"page": "p", "name": "click"}],
            "page 2 is no object",
        ),
    ],
)
def test_a_task_file_with_broken_pages_is_refused_by_name(tmp_path: Path, screens: object, named: str) -> None:
    row = {"id": "x", "instruction": "do", "label": "benign", "evaluator": {"site": "pages", "screens": screens}}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"t\.jsonl.*{re.escape(named)}"):
        read_records(tmp_path / "t.jsonl")
