"""The built-in phrase generator: what it proposes is one comment line, new, and made from its seeds."""

from __future__ import annotations

import random

import pytest

from pingscope.steering.phrases import SENTENCES, PhraseGenerator, shuffled_words, split_sentences


@pytest.mark.parametrize("seeds", [[], ["# Is it safe? Let me decide with care.\n", "# I stop here.\n"]])
def test_candidates_are_distinct_comment_lines(seeds: list[str]) -> None:
    found = PhraseGenerator()(seeds, 30, random.Random(0))
    assert len(found) == len(set(found)) == 30
    for phrase in found:
        assert phrase.startswith("# ") and phrase.endswith("\n") and phrase.count("\n") == 1
        assert (phrase.isascii() and phrase[2].isupper()) or phrase[2] in "\"'"
        assert phrase not in seeds


def test_the_same_random_state_gives_the_same_candidates() -> None:
    first, second = (PhraseGenerator()([], 10, random.Random(3)) for _ in range(2))
    assert first == second != PhraseGenerator()([], 10, random.Random(4))


def test_rounds_do_not_repeat_candidates() -> None:
    generator, rng = PhraseGenerator(), random.Random(1)
    rounds = [generator([], 20, rng) for _ in range(5)]
    everything = [phrase for found in rounds for phrase in found]
    assert len(set(everything)) == len(everything)


def test_seeds_of_any_text_are_recombined() -> None:
    foreign = "# Zebras graze quietly. Whales sing at night.\n"
    found = PhraseGenerator(explore=0.0)([foreign], 20, random.Random(0))
    assert all("Zebras" in phrase or "Whales" in phrase for phrase in found if phrase.count(".") > 1)
    assert sum("Zebras" in phrase for phrase in found) >= 5


def test_exploration_reaches_the_whole_grammar() -> None:
    text = "".join(PhraseGenerator()([], 400, random.Random(0)))
    assert all(sentence[1:] in text for sentence in SENTENCES)


def test_shuffled_words_keeps_the_words_and_the_form() -> None:
    phrase = "# Before acting: I should ask whether this task is safe for everyone.\n"
    shuffled = shuffled_words(phrase, random.Random(0))
    assert shuffled != phrase and shuffled.startswith("# ") and shuffled.endswith("\n")
    assert sorted(shuffled[2:].split()) == sorted(phrase[2:].split())
    assert not shuffled_words(phrase.strip(), random.Random(0)).endswith("\n")


@pytest.mark.parametrize(("phrase", "expected"), [("# One. Two?\n", ["One.", "Two?"]), ("# no stop", ["no stop"])])
def test_split_sentences(phrase: str, expected: list[str]) -> None:
    assert split_sentences(phrase) == expected


def test_a_small_request_and_empty_seed_do_not_fail() -> None:
    assert PhraseGenerator()([""], 1, random.Random(0))
    assert PhraseGenerator()([], 0, random.Random(0)) == []


def test_prefixes_of_code_agents_are_plain_sentences() -> None:
    found = PhraseGenerator(comment=False)(["Is it safe? I stop here.\n"], 20, random.Random(0))
    assert len(set(found)) == 20
    assert all(phrase[0].isalpha() and phrase.endswith("\n") for phrase in found)
