"""Algorithm 1: what the generator is shown, what is scored, what wins."""

from __future__ import annotations

import random

import pytest

from interp.errors import UserError
from steering.ping import DEFAULT, PAPER_CODE, PAPER_WEB, Score, Settings, ping


class Script:
    """Proposes fixed rounds and remembers the seeds it was shown."""

    def __init__(self, *rounds):
        self.rounds, self.shown = list(rounds), []

    def __call__(self, seeds, m, rng):
        self.shown.append(list(seeds))
        return self.rounds.pop(0)


def run(script, table, *, k=1, T=None, tau=1.5, **settings):
    asked = []

    def score(text):
        asked.append(text)
        return Score(*table[text])

    rounds = T or len(script.rounds)
    return ping(script, score, random.Random(0), k=k, M=3, T=rounds, tau=tau, **settings), asked


TABLE = {"a": (0.9, 0.1), "b": (0.2, 1.0), "c": (0.8, 0.8), "d": (0.1, 0.1)}


def test_seeds_are_the_union_of_three_top_lists():
    script = Script(["a", "b", "c", "d"], ["d"])
    result, _ = run(script, TABLE)
    assert script.shown == [[], ["c", "a", "b"]]
    assert result.best.text == "c"
    assert [candidate.text for candidate in result.candidates] == ["c", "b", "a", "d"]


def test_seeds_are_emptied_below_tau_and_kept_at_it():
    script = Script(["a"], ["d"], ["b"])
    run(script, TABLE, tau=1.2)
    assert script.shown == [[], [], []]
    script = Script(["b"], ["d"], ["a"])
    run(script, TABLE, tau=1.2)  # the best so far counts, also in later rounds
    assert script.shown == [[], ["b"], ["b"]]


def test_the_best_so_far_decides_not_the_best_of_the_round():
    script = Script(["c"], ["d"], ["a"])
    run(script, TABLE)
    assert "c" in script.shown[2]


def test_duplicates_are_never_scored_twice():
    script = Script(["a", "A ", "b"], ["a", "d"])
    result, asked = run(script, TABLE)
    assert asked == ["a", "b", "d"]
    assert [(one.proposed, one.repeated) for one in result.rounds] == [(3, 1), (2, 1)]


def test_on_scored_comes_with_each_score_and_ties_go_to_the_first():
    seen = []
    table = {"x": (0.5, 0.5), "y": (0.6, 0.4)}
    result, _ = run(Script(["x"], ["y"]), table, on_scored=seen.append)
    assert [(candidate.text, candidate.round) for candidate in seen] == [("x", 1), ("y", 2)]
    assert result.best.text == "x"
    assert result.to_dict()["best"]["overall"] == 1.0


def test_nothing_proposed_is_an_error():
    with pytest.raises(UserError, match="no prefix"):
        run(Script([], ["  "]), TABLE)


def test_the_papers_settings():
    assert (PAPER_WEB.k, PAPER_WEB.M, PAPER_WEB.T, PAPER_WEB.tau) == (3, 5, 20, 1.5)
    assert PAPER_CODE.tau == 1.0
    assert DEFAULT.M * DEFAULT.T <= 40
    with pytest.raises(UserError, match="M is 0"):
        Settings(k=1, M=0, T=1, tau=1.0)
