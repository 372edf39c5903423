"""Algorithm 1: what the generator is shown, what is scored, what wins."""

from __future__ import annotations

import random

import pytest

from pingscope.interp.errors import UserError
from pingscope.steering.ping import DEFAULT, PAPER_CODE, PAPER_WEB, PRESETS, Score, Settings, ping


class Script:
    """Proposes fixed rounds and remembers the seeds it was shown."""

    def __init__(self, *rounds):
        self.rounds, self.shown = list(rounds), []

    def __call__(self, seeds, m, rng):
        self.shown.append(list(seeds))
        return self.rounds.pop(0)


def run(script, table, *, k=1, T=None, tau=1.5, **settings):
    asked = []

    def score(texts):
        asked.extend(texts)
        return [table[text] and Score(*table[text]) for text in texts]

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


def test_left_out_candidates_are_neither_ranked_nor_asked_again():
    table = TABLE | {"e": None}
    result, asked = run(Script(["e", "a"], ["e", "d"]), table)
    assert asked == ["e", "a", "d"]
    assert [candidate.text for candidate in result.candidates] == ["a", "d"]
    assert [(one.repeated, one.dropped) for one in result.rounds] == [(0, 1), (1, 0)]


def test_an_estimate_never_wins_and_seeds_only_where_complete_scores_are_few():
    table = {"a": (0.8, 0.8), "b": (1.0, 1.0, {}, False)}
    script = Script(["a", "b"], [])
    result, _ = run(script, table)
    assert (result.best.text, result.rounds[0].best) == ("a", 1.6)
    assert script.shown[1] == ["a"]
    script = Script(["a", "b"], [])
    run(script, table, k=2)
    assert script.shown[1] == ["a", "b"]


def test_a_spent_budget_ends_the_search_before_the_next_round():
    spent = iter([False, True])
    script = Script(["a"], ["c"])
    result, _ = run(script, TABLE, over=lambda: next(spent))
    assert len(result.rounds) == 1 and result.best.text == "a"
    with pytest.raises(UserError, match="budget ended"):
        run(Script(["a"]), TABLE, over=lambda: True)


def test_the_papers_settings():
    assert (PAPER_WEB.k, PAPER_WEB.M, PAPER_WEB.T, PAPER_WEB.tau) == (3, 5, 20, 1.5)
    assert (PAPER_CODE.k, PAPER_CODE.M, PAPER_CODE.T, PAPER_CODE.tau) == (3, 5, 20, 1.0)
    web, code = PRESETS["paper-web"], PRESETS["paper-code"]
    assert (web.harmful, web.benign, web.comment) == (7, 7, True)
    assert (code.harmful, code.benign, code.comment) == (27, 10, False)
    assert DEFAULT.M * DEFAULT.T <= 40
    with pytest.raises(UserError, match="M is 0"):
        Settings(k=1, M=0, T=1, tau=1.0)
