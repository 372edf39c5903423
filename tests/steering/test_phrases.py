"""The built-in phrase generator: what it proposes is one comment line, new, and made from its seeds."""

from __future__ import annotations

import random

import pytest

from pingscope.experiments.agents.judges import judge
from pingscope.steering import conditional_phrases
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
    found = PhraseGenerator(style="bare")(["Is it safe? I stop here.\n"], 20, random.Random(0))
    assert len(set(found)) == 20
    assert all(phrase[0].isalpha() and phrase.endswith("\n") for phrase in found)


def conditional(phrase: str) -> bool:
    return not phrase.startswith("#")


def test_conditional_prefixes_begin_like_a_refusal_or_a_promise_and_hold_a_condition_of_that_kind() -> None:
    found = PhraseGenerator(style="conditional")([], 200, random.Random(0))
    assert len(set(found)) == 200
    for phrase in found:
        parts = conditional_phrases.read(phrase)
        assert parts.text == phrase and parts.opening in conditional_phrases.OPENINGS[parts.stance]
        assert set(parts.conditions) <= set(conditional_phrases.CONDITIONS[parts.stance]) and phrase[-1].isspace()
    stances = [conditional_phrases.read(phrase).stance for phrase in found]
    assert 50 < stances.count("refusal") < 150


def test_a_refusals_own_words_are_never_judged_as_the_models_refusal() -> None:
    for phrase in PhraseGenerator(style="conditional")([], 300, random.Random(1)):
        assert judge("the next page is here", prefix=phrase) == "invalid", phrase


def test_mixed_prefixes_hold_both_styles_in_the_stated_share_and_recombine_within_each() -> None:
    generator = PhraseGenerator(style="mixed", conditional=0.25)
    found = generator([], 400, random.Random(0))
    assert 70 <= sum(map(conditional, found)) <= 130
    seeds = ["# Zebras graze quietly. Whales sing at night.\n", "I will not do this if otters object. Otherwise: "]
    varied = PhraseGenerator(explore=0.0, style="mixed")(seeds, 100, random.Random(0))
    plain = [phrase for phrase in varied if conditional(phrase)]
    assert 20 <= len(plain) <= 80
    assert not any("Zebras" in phrase or "Whales" in phrase for phrase in plain)
    assert not any("otters" in phrase for phrase in varied if not conditional(phrase))
    assert sum("otters" in phrase for phrase in plain) >= 5


@pytest.mark.parametrize("seed", ["Is it safe? I stop here.", "I cannot", "", "Only if it is safe, so ", "if if if"])
def test_any_text_can_be_a_conditional_seed(seed: str) -> None:
    found = PhraseGenerator(explore=0.0, style="conditional")([seed], 12, random.Random(0))
    assert len(set(found)) == 12 and all(phrase.strip() and phrase[-1].isspace() for phrase in found)


def test_shuffled_words_of_a_plain_phrase_stay_plain() -> None:
    phrase = "I will not do this if it harms someone. Otherwise: "
    shuffled = shuffled_words(phrase, random.Random(0))
    assert sorted(shuffled.split()) == sorted(phrase.split()) and shuffled[0] != "#" and shuffled.endswith(" ")
