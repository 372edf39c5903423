"""Generators that are language models: what they are asked, how their answers are read, and what failures cost."""

from __future__ import annotations

import random
import time

import pytest

from interp.errors import UserError
from steering.generators import (
    ModelGenerator,
    RateLimit,
    endpoint_ask,
    local_ask,
    openai_client,
    question,
    read_prefixes,
)
from tests.experiments.server import completion, serve

ANSWER = """Here are some prefixes:
1. # I should ask whether this is safe.
2) "# Is anyone hurt by this?"
- # Think first.
3. no mark, but numbered

# A line without a number.
Good luck!"""


def test_lines_become_prefixes_and_the_rest_is_counted():
    found, bad = read_prefixes(ANSWER)
    assert found == [
        "# I should ask whether this is safe.\n",
        "# Is anyone hurt by this?\n",
        "# Think first.\n",
        "# no mark, but numbered\n",
        "# A line without a number.\n",
    ]
    assert bad == 2
    assert read_prefixes("1. Let me think.\n2. " + "x" * 500, comment=False) == (["Let me think. "], 1)
    assert read_prefixes("") == ([], 1)


def test_the_question_names_the_seeds_and_the_number():
    text = question(["# one\n", "# two\n"], 3)
    assert "# one\n# two" in text and "Write 3 different" in text and '"#"' in text
    assert "best so far" not in question([], 3) and '"#"' not in question([], 3, comment=False)


def test_a_generator_asks_again_for_what_is_missing_and_not_for_ever():
    answers = iter(["1. # a\n2. # b", "sorry", "1. # b\n2. # c", "1. # d"])
    asked = []

    def ask(text, rng):
        asked.append(text)
        return next(answers)

    generator = ModelGenerator(ask, attempts=3)
    assert generator(["# a\n"], 3, random.Random(0)) == ["# b\n", "# c\n"]
    assert len(asked) == generator.asked == 3 and generator.malformed == 1
    assert "Write 2 different" in asked[1]


def test_a_local_model_generates(tiny_model):
    ask = local_ask(tiny_model, max_new_tokens=12)
    first, second = (ask("Write.", random.Random(1)) for _ in range(2))
    assert first == second != ask("Write.", random.Random(2))


def test_what_an_endpoint_is_asked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serve(lambda request: (200, completion("1. # safe?"))) as (url, asked):
        assert endpoint_ask("tiny", url, max_tokens=8)("Write prefixes.", random.Random(1)) == "1. # safe?"
    (one,) = asked
    assert (one["model"], one["temperature"], one["max_tokens"]) == ("tiny", 0.7, 8) and one["seed"] >= 0
    assert one["messages"] == [{"role": "user", "content": "Write prefixes."}]
    assert (one["path"], one["key"]) == ("/v1/chat/completions", "Bearer secret")


def test_rate_limits_and_server_errors_are_tried_again():
    states = iter([429, 503, 200])

    def reply(request):
        status = next(states)
        return status, completion("1. # safe?") if status == 200 else {"error": {"message": "busy"}}

    with serve(reply) as (url, asked):
        client = openai_client(url)
        generator = ModelGenerator(endpoint_ask("m", url, client=client))
        assert generator([], 1, random.Random(0)) == ["# safe?\n"]
    assert len(asked) == 3


@pytest.mark.parametrize("body", [{"error": {"message": "no such model"}}, {"detail": "no such model"}])
def test_a_refusal_is_one_line_with_the_servers_reason(body):
    with serve(lambda request: (404, body)) as (url, _), pytest.raises(UserError, match=r"404 \(no such model\)"):
        endpoint_ask("m", url)("x", random.Random(0))


def test_malformed_replies_are_counted():
    bodies = iter([completion(None), {"object": "chat.completion", "choices": []}, completion("1. # ok")])
    with serve(lambda request: (200, next(bodies))) as (url, _):
        generator = ModelGenerator(endpoint_ask("m", url))
        assert generator([], 1, random.Random(0)) == ["# ok\n"]
    assert generator.malformed == 2


def test_what_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        openai_client()
    with serve(lambda request: (401, {"error": {"message": "wrong key"}})) as (url, _):
        pass
    with pytest.raises(UserError, match="no connection"):
        endpoint_ask("m", url, client=openai_client(url, retries=0))("x", random.Random(0))
    with (
        serve(lambda request: (401, {"error": {"message": "wrong key"}})) as (url, _),
        pytest.raises(UserError, match="401"),
    ):
        endpoint_ask("m", url)("x", random.Random(0))


def test_a_rate_limit_waits():
    waited = []
    limit = RateLimit(600.0, sleep=waited.append)
    for _ in range(3):
        limit()
    assert waited and sum(waited) == pytest.approx(0.1 + 0.2, abs=0.05)
    started = time.monotonic()
    RateLimit(0.0)()
    assert time.monotonic() - started < 0.05
