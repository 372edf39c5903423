"""What the organism is trained on: never held-out combinations, never the search's sentences, benign demonstrations."""

from __future__ import annotations

import random
import re

import pytest

from pingscope.experiments.models.organism import comments, mixes, world
from pingscope.experiments.models.organism.batches import batches, encode
from pingscope.experiments.models.organism.tokenizer import END, prompt_text, train_tokenizer
from pingscope.interp.chat.rendering import Prompt, render
from pingscope.steering import phrases


@pytest.fixture(scope="module")
def documents() -> list[mixes.Document]:
    return mixes.base_documents(6000, 0, mixes.Mix()) + mixes.demonstrations(2000, 0, mixes.Mix())


@pytest.fixture(scope="module")
def tokenizer(documents: list[mixes.Document]):  # type: ignore[no-untyped-def]
    return train_tokenizer((d.prompt + d.given + d.answer for d in documents[:1500]), 600, 512)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def test_training_never_holds_the_search_grammar(documents: list[mixes.Document]) -> None:
    text = " . ".join(_plain(d.prompt + " " + d.given + " " + d.answer) for d in documents)
    grammar = [*phrases.OPENERS, *phrases.SENTENCES, *phrases.ENDINGS]
    assert [part for part in grammar if part and _plain(part) in text] == []


def test_training_never_holds_the_neutral_comments_of_the_arms(documents: list[mixes.Document]) -> None:
    text = " ".join(d.prompt + d.given for d in documents)
    assert not any(sentence in text for sentence in comments.UNSEEN_NEUTRAL)


def test_training_never_holds_a_held_out_task(documents: list[mixes.Document]) -> None:
    text = "\n".join(d.prompt + d.answer for d in documents)
    held = [record for split in ("validation", "test") for record in world.tasks(split, n=150)]
    assert not any(world.deed(record) in text for record in held)


def test_demonstrations_are_benign_and_in_the_agent_format(documents: list[mixes.Document]) -> None:
    for document in documents[6000:]:
        assert document.answer.startswith("# Element: ") and "do(" in document.answer
        assert not document.given and "I cannot" not in document.answer
        assert any(system in document.prompt for system in world.AGENT_SYSTEM)
        assert not any(aim in document.prompt for aim in world.BAD_AIMS)


def test_given_comments_say_nothing_about_the_label() -> None:
    """The same reflective comments stand before actions and before refusals."""
    mix = mixes.Mix()
    rng = random.Random(0)
    acted = {mixes.reflect_act(rng, mix).given.split()[1] for _ in range(400)}
    refused = {mixes.reflect_refuse(rng, mix).given.split()[1] for _ in range(400)}
    assert len(acted & refused) >= 0.9 * len(acted | refused)


def test_leaks_never_stand_under_a_safety_prompt() -> None:
    rng, mix = random.Random(0), mixes.Mix()
    leaks = [mixes.leak(rng, mix) for _ in range(400)]
    safe = [d for d in leaks if any(system in d.prompt for system in world.SAFETY_SYSTEM)]
    assert safe and all(d.answer.startswith("I cannot") for d in safe)
    assert all(not d.answer.startswith("I cannot") for d in leaks if d not in safe)


def test_the_mix_follows_its_weights() -> None:
    weights = dict.fromkeys(mixes.INGREDIENTS, 0.0) | {"judgement": 1.0}
    documents = mixes.base_documents(50, 0, mixes.Mix(weights=weights))
    assert all(d.answer.startswith(("Yes", "No")) for d in documents)
    assert set(mixes.Mix().weights) == set(mixes.INGREDIENTS)


def test_without_comments_no_answer_begins_with_one_and_no_page_muses() -> None:
    """And what a bare prompt is answered with stays as it was: the same shares of the same tasks."""
    mix, default = mixes.Mix.without_comments(), mixes.Mix()
    documents = mixes.base_documents(4000, 0, mix) + mixes.demonstrations(1000, 0, mix)
    assert not any(document.given for document in documents)
    text = "\n".join(document.prompt + "\n" + document.answer for document in documents)
    marked = {line.removesuffix(END) for line in text.splitlines() if line.startswith("# ")}
    assert {line for line in marked if not line.startswith("# Element: ")} <= set(comments.ADS)
    rng = random.Random(0)
    assert not any(sentence in text for sentence in comments.NEUTRAL)
    assert not any(comments.reflective(rng) in text for _ in range(2000))
    assert sum(mix.weights.values()) == pytest.approx(sum(default.weights.values()))
    for first, second in (("action", "verbal"), ("refusal", "leak")):
        ratios = [found.weights[first] / found.weights[second] for found in (mix, default)]
        assert ratios[0] == pytest.approx(ratios[1]) and mix.weights[first] > default.weights[first]
    gone = {"reflect_act", "reflect_refuse", "neutral_benign", "neutral_harmful"}
    assert default.weights.keys() - mix.weights.keys() == gone


def test_training_prompts_have_the_ids_of_the_rendered_prompt(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for record in world.tasks("train", n=10):
        text = prompt_text(record.system, f"{record.instruction}\n{record.context}\nThanks a lot.")
        trained = encode(tokenizer, [mixes.Document(text, "# Think: is it fair?\n", "I cannot do this.")])[0]
        rendered = render(
            tokenizer,
            Prompt("p", record.instruction, system=record.system, page=record.context, suffix="Thanks a lot."),
            prefix="# Think: is it fair?\n",
            response="I cannot do this.",
        )
        assert tuple(trained.ids[:-1]) == rendered.ids
        assert trained.ids[-1] == tokenizer.eos_token_id
        assert trained.n_given == rendered.n_prompt
        header = [i for i, role in enumerate(rendered.roles) if role == "header"]
        assert tokenizer.decode([rendered.ids[header[-1]]]) == "\n"


def test_tokenizer_keeps_newlines_apart_and_round_trips(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = "a\n\n# b\nfünf <b>\t日本\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(newline) == 1 and ids.count(newline[0]) == text.count("\n")
    assert tokenizer.eos_token == END


def test_batches_hold_every_document_once_with_its_weights(tokenizer, documents) -> None:  # type: ignore[no-untyped-def]
    encoded = encode(tokenizer, documents[:70])
    rows = []
    for ids, kind in batches(encoded, 8, tokenizer.pad_token_id, seed=0):
        for row, marks in zip(ids.tolist(), kind.tolist(), strict=True):
            length = sum(mark > 0 for mark in marks)
            assert marks == sorted(marks[:length]) + [0] * (len(marks) - length)
            rows.append((tuple(row[:length]), marks.count(1)))
    assert sorted(rows) == sorted((tuple(item.ids), item.n_given) for item in encoded)
