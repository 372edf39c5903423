"""Rates from episodes, paired differences, the journal that resumes, and the prefix search on top of them."""

from __future__ import annotations

import json

import pytest

from pingscope.experiments.agents.rollout import AnyAction, Episode, Turn
from pingscope.experiments.studies.behaviour import compare, evaluate_arm, rates, run_arm
from pingscope.experiments.studies.search.prefix_search import search_prefix
from pingscope.experiments.studies.search.prefix_table import Budget
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm
from pingscope.steering.ping import Settings
from tests.scripted import scripted

__all__ = ["scripted"]

REFUSAL, ACTION, PROSE = "I cannot help with that.", "do(Click, 7)", "Sure, click it."


class Judged(AnyAction):
    """Any action is success."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.success = False

    def step(self, call) -> None:
        self.done = self.success = True


def episode(number: int, label: str, text: str, success: bool | None) -> Episode:
    return Episode(f"{label}{number}", label, (Turn("0", text, "ok", True),), success)


def records(n: int = 4) -> list[Record]:
    return [
        Record(f"{label}{i}", f"{label} task {i}", label, domain="web")
        for label in ("harmful", "benign", "lookalike")
        for i in range(n)
    ]


def test_rates_by_label_and_judge():
    episodes = [
        episode(0, "harmful", REFUSAL, False),
        episode(1, "harmful", ACTION, True),
        episode(2, "harmful", PROSE, False),
        episode(3, "harmful", ACTION, None),
        episode(0, "benign", "# I cannot see it, sorry.\n" + ACTION, True),
    ]
    found = rates(episodes)
    assert set(found) == {"harmful", "benign"}
    assert set(found["harmful"]) == {"strict", "paper", "jbb"}
    strict = found["harmful"]["strict"]
    assert set(strict) == {"refusal_rate", "attack_success_rate", "invalid_rate"}
    assert strict["refusal_rate"]["value"] == 0.25
    assert strict["invalid_rate"]["value"] == 0.25
    assert (strict["attack_success_rate"]["n"], strict["attack_success_rate"]["n_missing"]) == (3, 1)
    assert strict["attack_success_rate"]["value"] == pytest.approx(1 / 3)
    assert set(strict["refusal_rate"]) == {"value", "ci", "n", "n_missing"}
    assert found["benign"]["strict"]["success_rate"]["value"] == 1
    assert found["benign"]["paper"]["success_rate"]["value"] == 0


def test_compare_pairs_tasks():
    before = [episode(i, "harmful", ACTION, True) for i in range(8)]
    after = [episode(i, "harmful", REFUSAL if i < 7 else ACTION, i == 7) for i in range(8)]
    found = compare(after, before)["harmful"]["strict"]
    assert found["refusal_rate"]["value"] == 7 / 8
    assert found["refusal_rate"]["p_value"] == pytest.approx(2 / 2**7)
    assert found["attack_success_rate"]["value"] == -7 / 8
    assert found["invalid_rate"]["p_value"] == 1
    with pytest.raises(UserError, match="different tasks"):
        compare(after, before[1:])


def test_missing_success_is_missing_in_pairs():
    before = [episode(i, "benign", ACTION, None) for i in range(3)]
    found = compare(before, before)["benign"]["strict"]["success_rate"]
    assert (found["value"], found["n_missing"], found["p_value"]) == (None, 3, None)


def answer(prompt):
    return REFUSAL if prompt.label == "harmful" else ACTION


def test_journal_resumes_by_content(scripted, tmp_path):
    journal = tmp_path / "generations.jsonl"
    model, arm = scripted(answer), Arm("agent", prefix="# a\n")
    first = run_arm(model, records(), arm, Judged, journal=journal)
    assert "benign task" not in journal.read_text()
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {(row["arm"], row["model"]) for row in rows} == {("agent", "scripted")}

    again = scripted(answer)
    counted = []
    assert run_arm(again, records(), arm, Judged, journal=journal, progress=counted.append) == first
    assert again.asked == []
    assert sum(counted) == len(first)

    journal.write_text(journal.read_text()[:-40])  # a kill in the middle of the last line
    torn = scripted(answer)
    assert run_arm(torn, records(), arm, Judged, journal=journal) == first
    assert torn.asked == [[first[-1].id]]

    for changed in ({"arm": Arm("agent", prefix="# b\n")}, {"max_new_tokens": 5}, {"make_env": AnyAction}):
        other = scripted(answer)
        run_arm(other, records(), **({"arm": arm, "make_env": Judged, "journal": journal} | changed))
        assert sum(map(len, other.asked)) == len(first)


def test_evaluate_arm_gives_rates(scripted):
    found = evaluate_arm(scripted(answer), records(), Arm("agent"), Judged)
    assert found["harmful"]["strict"]["refusal_rate"]["value"] == 1
    assert found["lookalike"]["strict"]["success_rate"]["value"] == 1


def by_prefix(prompt):
    """``good`` restores refusal, ``bad`` refuses everything, anything else does nothing."""
    prefix = prompt.prefix.lower()
    refuses = "bad" in prefix or ("good" in prefix and prompt.label == "harmful")
    return REFUSAL if refuses else ACTION


def proposals(seeds, m, rng):
    texts = ["# good\n", "# bad\n", "# plain\n", "# other\n", "#  GOOD \n"]
    return rng.sample(texts, min(m, len(texts)))


def search(model, journal, **settings):
    settings = {"settings": Settings(k=1, M=3, T=3, tau=1.5), "generator": proposals} | settings
    return search_prefix(model, records(), Judged, journal=journal, **settings)


def test_search_finds_the_prefix_and_keeps_every_score(scripted, tmp_path):
    journal, seen = tmp_path / "search.jsonl", []
    result = search(scripted(by_prefix), journal, progress=seen.append)
    assert result.best.text.lower().split() == ["#", "good"]
    assert (result.best.score.perf, result.best.score.refusal, result.best.score.overall) == (1, 1, 2)
    assert result.best.score.counts["n_benign"] == 8
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    scores = {row["text"]: row for row in rows if row.get("note") == "score"}
    assert set(scores) == {candidate.text for candidate in seen}
    bad = next(row for text, row in scores.items() if "bad" in text)
    assert (bad["perf"], bad["refusal"], bad["counts"]["success"]) == (0, 1, 0)
    low, high = bad["counts"]["ci"]["refusal"]
    assert 0 < low < high == 1


def measured(journal):
    """(prefix, task) of every outcome in a journal, with repetitions."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(row["key"], task) for row in rows if "outcomes" in row for task in row["outcomes"]]


def test_search_resumes_after_a_kill_without_an_evaluation_lost_or_repeated(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr("pingscope.experiments.studies.search.prefix_table.CHUNK", 7)
    journal = tmp_path / "search.jsonl"
    whole = search(scripted(by_prefix), journal)
    lines = journal.read_text().splitlines(keepends=True)
    everything = measured(journal)
    assert len(everything) == len(set(everything)) == len(whole.candidates) * len(records())
    cut = len(lines) // 2
    journal.write_text("".join(lines[:cut]) + lines[cut][:20])
    before = set(measured_of(lines[:cut]))
    model = scripted(by_prefix)
    assert search(model, journal) == whole
    again = measured(journal)
    assert sorted(again) == sorted(everything)
    assert before < set(again) and sum(map(len, model.asked)) == len(everything) - len(before)


def measured_of(lines):
    rows = [json.loads(line) for line in lines]
    return [(row["key"], task) for row in rows if "outcomes" in row for task in row["outcomes"]]


def test_a_budget_of_generations_ends_the_search_and_is_the_same_when_resumed(scripted, tmp_path):
    journal = tmp_path / "search.jsonl"
    n = len(records())
    found = search(scripted(by_prefix), journal, budget=Budget(generations=2 * n))
    assert found.notes["stopped_by_budget"] and len(found.rounds) == 1
    assert search(scripted(by_prefix), journal, budget=Budget(generations=2 * n)) == found
    with pytest.raises(UserError, match="negative"):
        Budget(minutes=-1)


def test_prefixes_of_a_round_share_one_call(scripted, tmp_path):
    model = scripted(by_prefix)
    found = search(model, tmp_path / "search.jsonl", settings=Settings(k=1, M=3, T=1, tau=1.5))
    assert len(model.asked[0]) == len(found.candidates) * len(records())


def test_a_journal_of_another_search_is_set_aside_and_comes_back(scripted, tmp_path):
    journal = tmp_path / "search.jsonl"
    search(scripted(by_prefix), journal)
    before = journal.read_text()
    other = scripted(by_prefix)
    other.fingerprint = "another model"
    search(other, journal)
    assert other.asked
    assert journal.read_text() != before
    model = scripted(by_prefix)
    search(model, journal)
    assert (model.asked, journal.read_text()) == ([], before)


def test_perf_success_needs_judged_tasks(scripted, tmp_path):
    journal = tmp_path / "search.jsonl"
    found = search(scripted(lambda p: PROSE), journal, perf="success")
    assert found.best.score.perf == 0
    assert search(scripted(lambda p: PROSE), journal).best.score.perf == 1
    with pytest.raises(UserError, match="use perf not_refused"):
        search_prefix(scripted(by_prefix), records(), AnyAction, journal=journal, generator=proposals, perf="success")
    with pytest.raises(UserError, match="needs harmful tasks and benign ones"):
        search_prefix(scripted(by_prefix), records()[:4], Judged, journal=journal)
