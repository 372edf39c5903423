"""Generators that are language models: what they are asked, how their answers are read, and what failures cost."""

from __future__ import annotations

import random
import time

import pytest

from pingscope.interp.errors import UserError
from pingscope.interp.generate.generation import Generation, generate
from pingscope.steering import generators
from pingscope.steering.generators import (
    ModelGenerator,
    RateLimit,
    endpoint_ask,
    kept,
    local_ask,
    openai_client,
    question,
    read_prefixes,
)
from pingscope.steering.ping import ping
from tests.server import completion, serve

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
    assert read_prefixes("<think>\n1. # a draft\n</think>\n1. **# I stop.**") == (["# I stop.\n"], 0)
    assert read_prefixes("<think>\n1. # a draft") == ([], 1)
    channels = (
        "<|channel|>analysis<|message|>1. # a draft\n<|end|><|start|>assistant<|channel|>final<|message|>1. # I stop."
    )
    for thought in (channels, "[THINK]\n1. # a draft\n[/THINK]\n1. # I stop.", "1. # a draft\n</think>\n1. # I stop."):
        assert read_prefixes(thought) == (["# I stop.\n"], 0)


def test_the_question_names_the_seeds_and_the_number():
    text = question(["# one\n", "# two\n"], 3)
    assert "# one\n# two" in text and "Write 3 different" in text and '"#"' in text
    assert "best so far" not in question([], 3) and '"#"' not in question([], 3, comment=False)


def answering(*answers):
    """An ``ask`` with these answers, and the questions it got."""
    left, asked = iter(answers), []

    def ask(text, seed):
        asked.append((text, seed))
        return next(left)

    return ask, asked


def test_a_generator_asks_again_for_what_is_missing_and_not_for_ever():
    ask, asked = answering("1. # a\n2. # b", "sorry", "1. # b\n2. # c", "1. # d")
    generator = ModelGenerator(ask, attempts=3)
    assert generator(["# a\n"], 3, random.Random(0)) == ["# b\n", "# c\n"]
    assert len(asked) == generator.asked == 3 and generator.malformed == 1
    assert (generator.usable, generator.repeated) == (4, 2)
    assert "Write 2 different" in asked[1][0]


def test_the_same_words_are_proposed_once():
    ask, _ = answering("1. # a\n2. #  A\n3. # b\n4. # b", "1. # c", "1. # B\n2. # a", "1. # d\n2. # e\n3. # f")
    generator, rng = ModelGenerator(ask, attempts=2), random.Random(0)
    assert generator([], 3, rng) == ["# a\n", "# b\n", "# c\n"]
    assert generator(["# a\n"], 2, rng) == ["# d\n", "# e\n"]
    assert generator.repeated == 4


def test_a_generator_of_nothing_says_what_it_answered():
    generator = ModelGenerator(lambda text, seed: "Sure, pick write on this page.")
    with pytest.raises(UserError, match=r"asked 8 times, 8 malformed .* it answers 'Sure, pick write on this page.'"):
        ping(generator, lambda texts: [], random.Random(0), k=1, M=2, T=2, tau=1.0)
    useful = ModelGenerator(lambda text, seed: "1. # a")
    useful([], 1, random.Random(0))
    assert useful.account() == "asked 1 times, 0 malformed lines or answers, 0 repeated"


def test_kept_answers_are_not_asked_for_again(tmp_path):
    journal = tmp_path / "generator.jsonl"
    ask, asked = answering("1. # a\n2. # b", "1. # c\n2. # d", "1. # other")
    rounds = [ModelGenerator(kept(ask, journal, ["m"]))([], 2, random.Random(seed)) for seed in (0, 1, 0)]
    assert rounds[0] == rounds[2] == ["# a\n", "# b\n"] != rounds[1] and len(asked) == 2
    with journal.open("a") as handle:
        handle.write('{"key": "torn')
    again = kept(ask, journal, ["m"])
    assert ModelGenerator(again)([], 2, random.Random(1)) == rounds[1] and len(asked) == 2
    assert kept(ask, journal, ["another"])(*asked[0]) == "1. # other"


def test_a_local_model_generates(tiny_model, monkeypatch):
    texts, settings = [], []

    def spoken(model, rows, **given):
        texts.append(generate(model, rows, **given)[0])
        settings.append(given)
        return texts[-1:]

    monkeypatch.setattr(generators, "generate", spoken)
    ask = local_ask(tiny_model, max_new_tokens=12)
    for seed in (1, 1, 2):
        ask("Write.", seed)
    assert texts[0] == texts[1] != texts[2]
    assert settings[-1]["max_new_tokens"] == 12
    # An answer is no longer than what the question leaves of the context.
    local_ask(tiny_model, max_new_tokens=10_000)("Write " * 100, 1)
    assert 0 < settings[-1]["max_new_tokens"] < tiny_model.context_length - 100


def test_a_line_that_was_cut_is_no_prefix(tiny_model, monkeypatch):
    for finished, expected in ((False, "1. # Is it safe?"), (True, "1. # Is it safe?\n2. # I sto")):
        said = Generation("q", "1. # Is it safe?\n2. # I sto", (), finished)
        monkeypatch.setattr(generators, "generate", lambda *_, said=said, **__: [said])
        assert local_ask(tiny_model)("Write.", 1) == expected
    with serve(lambda request: (200, completion("1. # Is it safe?\n2. # I sto", "length"))) as (url, _):
        assert endpoint_ask("m", url)("Write.", 1) == "1. # Is it safe?"


def test_a_thought_that_the_prompt_opens_is_no_prefix(tiny_model, monkeypatch):
    for text, expected in (
        ("1. # a draft\n2. # a draft", ([], 1)),
        ("1. # a\n</think>\n1. # I stop.", (["# I stop.\n"], 0)),
    ):
        said = Generation("q", text, (), True)
        monkeypatch.setattr(generators, "generate", lambda *_, said=said, **__: [said])
        assert read_prefixes(local_ask(tiny_model)("Write.", 1))[0], "read as they stand where no thought is open"
        with monkeypatch.context() as thinking:
            thinking.setattr(tiny_model.tokenizer, "chat_template", tiny_model.tokenizer.chat_template + "<think>\n")
            assert read_prefixes(local_ask(tiny_model)("Write.", 1)) == expected


def test_what_an_endpoint_is_asked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serve(lambda request: (200, completion("1. # safe?"))) as (url, asked):
        assert endpoint_ask("tiny", url, max_tokens=8)("Write prefixes.", 1) == "1. # safe?"
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
        endpoint_ask("m", url)("x", 0)


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
        endpoint_ask("m", url, client=openai_client(url, retries=0))("x", 0)
    with (
        serve(lambda request: (401, {"error": {"message": "wrong key"}})) as (url, _),
        pytest.raises(UserError, match="401"),
    ):
        endpoint_ask("m", url)("x", 0)


def test_a_rate_limit_waits():
    waited = []
    limit = RateLimit(600.0, sleep=waited.append)
    for _ in range(3):
        limit()
    assert waited and sum(waited) == pytest.approx(0.1 + 0.2, abs=0.05)
    started = time.monotonic()
    RateLimit(0.0)()
    assert time.monotonic() - started < 0.05
