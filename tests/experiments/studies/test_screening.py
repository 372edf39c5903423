"""Screening: stages of a race, its stopping rule, the cheap score, and falling back where it is poor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pingscope.experiments.studies.search.prefix_table import PrefixTable, TaskOutcome
from pingscope.experiments.studies.search.screening import Screen, Screened, race_stages, spearman, upper_bound
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from tests.experiments.studies.test_behaviour import ACTION, REFUSAL, Judged
from tests.scripted import scripted

__all__ = ["scripted"]


def records(harmful: int, benign: int) -> list[Record]:
    made = [("harmful", i) for i in range(harmful)] + [("benign", i) for i in range(benign)]
    return [Record(f"{label}{i}", f"{label} task {i}", label, domain="web") for label, i in made]


def test_stages_cover_every_task_once_and_keep_the_shares():
    tasks = records(40, 20)
    stages = race_stages(tasks, 8)
    assert sorted(i for stage in stages for i in stage) == list(range(60))
    assert [len(stage) for stage in stages] == [12, 12, 24, 12]
    for stage in stages:
        assert sum(tasks[i].label == "harmful" for i in stage) == 2 * sum(tasks[i].label == "benign" for i in stage)
    assert race_stages(tasks, 100) == [race_stages(tasks, 40)[0]]


def outcome(refused: bool) -> TaskOutcome:
    return TaskOutcome(refused, not refused, 1, 5)


@pytest.mark.parametrize("guessing", ["nothing", "well", "wildly"])
def test_the_stopping_rule_keeps_its_promise(guessing):
    """On 16 + 16 of 64 + 64 tasks, a prefix that is better on all is dropped in fewer than delta of races, whatever
    the guess is worth; one far worse almost always.
    """
    tasks, rng, alpha = records(64, 64), np.random.default_rng(0), 0.05
    harmful = np.arange(128) < 64
    run = [*range(16), *range(64, 80)]

    def race(share, guessing=guessing):
        best, other = (np.where(harmful, rng.random(128) < s, rng.random(128) < 1 - s) for s in (0.7, share))
        gap = other - best.astype(float)
        truth = gap[harmful].mean() - gap[~harmful].mean()
        noise = {"nothing": None, "well": 0.3, "wildly": 2.0}[guessing]
        guess = None if noise is None else gap + noise * rng.standard_normal(128)
        a, b = ({i: outcome(bool(x[i])) for i in run} for x in (other, best))
        return truth, upper_bound(a, b, tasks, "not_refused", alpha, guess=guess)

    even = [race(0.7) for _ in range(400)]
    assert sum(truth > 0 and bound <= 0 for truth, bound in even) / 400 <= 1.5 * alpha
    assert sum(bound <= 0 for _, bound in (race(0.1) for _ in range(100))) > 95
    if guessing == "well":
        blind = [race(0.7, "nothing") for _ in range(200)]
        widths = [np.mean([bound - truth for truth, bound in found]) for found in (even, blind)]
        assert widths[0] < 0.7 * widths[1]


def test_all_tasks_run_leaves_no_doubt():
    tasks = records(4, 4)
    ours, theirs = ({i: outcome(i < n) for i in range(8)} for n in (3, 4))
    assert upper_bound(ours, theirs, tasks, "not_refused", 0.05) == pytest.approx(-0.25)


def test_no_common_task_means_no_verdict():
    tasks = records(2, 2)
    assert upper_bound({0: outcome(True)}, {0: outcome(True)}, tasks, "not_refused", 0.05) == math.inf


def test_spearman_with_its_interval():
    x = list(range(20))
    found = spearman(x, [v**3 for v in x])
    assert (found.value, found.n) == (pytest.approx(1), 20) and found.ci == pytest.approx((1, 1))
    noise = spearman(x, list(np.random.default_rng(0).permutation(20)))
    assert noise.ci[0] < noise.value < noise.ci[1] and noise.ci[1] - noise.ci[0] > 0.4
    assert math.isnan(spearman([1, 2], [1, 2]).value) and math.isnan(spearman(x, [1] * 20).value)


def by_quality(prompt):
    """``# q7`` refuses 70% of harmful tasks and nothing else."""
    number = int(prompt.id.removeprefix(prompt.label))
    quality = int(prompt.prefix.strip().removeprefix("# q"))
    return REFUSAL if prompt.label == "harmful" and number % 10 < quality else ACTION


def screened(scripted, tmp_path, cheap, **settings):
    settings = {"propose": 1} | settings
    table = PrefixTable(scripted(by_quality), records(40, 40), Judged, tmp_path / "search.jsonl")
    return table, Screened(table, "not_refused", Screen(**settings), cheap)


def quality(texts, tasks):
    """Leans to refusal on harmful tasks as the prefix does."""
    return np.array([[float(t.strip().removeprefix("# q")) / 10 * (i < 40) for i in tasks] for t in texts])


def rounds(scorer):
    names = [f"# q{i}\n" for i in (3, 9, 1, 0, 6, 2)], [f"# q{i}\n" for i in (5, 10, 4, 8, 7)]
    return [dict(zip(texts, scorer(texts), strict=True)) for texts in names]


def test_a_race_spends_on_the_promising_and_finds_the_best(scripted, tmp_path):
    table, scorer = screened(scripted, tmp_path, None)
    first, second = rounds(scorer)
    assert scorer.best == "# q10\n"
    complete = {t: s.overall for t, s in (first | second).items() if s is not None and s.complete}
    assert max(complete, key=complete.get) == "# q10\n" and "# q0\n" not in complete
    assert table.generations < 0.6 * 11 * 80
    assert scorer.dropped["in a race"] >= 4
    assert math.isnan(scorer.correlation().value)


def test_a_trusted_cheap_score_leaves_candidates_out_and_a_poor_one_does_not(scripted, tmp_path):
    _, good = screened(scripted, tmp_path / "good", quality, keep=0.5)
    first, second = rounds(good)
    assert all(score is not None for score in first.values())  # it has to show first that it ranks
    assert sum(score is None for score in second.values()) == 2 and second["# q10\n"] is not None
    assert good.correlation().value > 0.9 and good.dropped["by the cheap score"] == 2

    rng = np.random.default_rng(3)
    _, poor = screened(
        scripted, tmp_path / "poor", lambda texts, tasks: rng.random((len(texts), len(tasks))), trust=0.9
    )
    first, second = rounds(poor)
    assert not poor.trusted() and all(score is not None for score in (first | second).values())
    assert poor.best == "# q10\n"


def test_a_trusted_cheap_score_chooses_from_many(scripted, tmp_path):
    _, scorer = screened(scripted, tmp_path, quality, propose=3, learn=3)
    texts = [f"# q{i}\n" for i in (3, 9, 1, 0, 6, 2, 7, 10, 11)]
    first = scorer(texts)
    # The first, third and last of the nine by the cheap score: three alike would not show whether it ranks.
    assert {text for text, score in zip(texts, first, strict=True) if score is not None} == {
        "# q11\n",
        "# q9\n",
        "# q0\n",
    }
    second = dict(zip(["# q5\n", "# q4\n", "# q8\n"], scorer(["# q5\n", "# q4\n", "# q8\n"]), strict=True))
    assert [text for text, score in second.items() if score is not None] == ["# q8\n"]


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="keep and delta"):
        Screen(keep=0)
