"""The writer: what it is taught, its folder, its reuse, and its answers through the search's generator."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pingscope.experiments.models import writer
from pingscope.experiments.models.organism import comments
from pingscope.experiments.models.organism.recipe import Recipe
from pingscope.experiments.models.organism.tokenizer import prompt_text
from pingscope.experiments.models.writer import build_writer, writer_key
from pingscope.experiments.models.writer_quality import measure_proposals
from pingscope.experiments.models.writer_texts import documents, joints, origin, question_pieces
from pingscope.interp.errors import UserError
from pingscope.interp.loading import load_model
from pingscope.steering.generators import ModelGenerator, local_ask, question, read_prefixes
from pingscope.steering.phrases import SENTENCES, PhraseGenerator, compose, split_sentences

pytestmark = pytest.mark.slow

TINY = replace(Recipe.tiny(), base_steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writers") / "writer"
    build_writer(out, seed=3, recipe=TINY)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.hf.parameters(), b.hf.parameters(), strict=True))


def test_the_folder_is_an_ordinary_model_without_a_pickle(folder: Path, model: Any) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert model.hf.config.model_type == "llama"
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question(["# a\n"], 4)}], tokenize=False, add_generation_prompt=True
    )
    assert text == prompt_text("", question(["# a\n"], 4))
    # The question's wording is a few tokens and reads back as it was.
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(ids) < 40 and model.tokenizer.decode(ids) == text
    assert all(model.tokenizer.convert_tokens_to_ids(piece) in ids for piece in question_pieces())


def test_the_generator_reads_it_and_answers_are_reproducible(model: Any) -> None:
    ask = local_ask(model, max_new_tokens=30)
    generator = ModelGenerator(ask, attempts=2)
    generator([], 2, random.Random(0))
    assert generator.asked == 2 and generator.malformed > 0  # hardly trained at all
    assert generator.account().startswith("asked 2 times")
    again = ModelGenerator(ask, attempts=2)
    again([], 2, random.Random(0))
    assert again.account() == generator.account()


def test_the_same_seed_gives_the_same_weights_and_is_not_trained_twice(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = build_writer(tmp_path / "again", seed=3, recipe=TINY)
    assert same(model, load_model(tmp_path / "again"))
    build_writer(tmp_path / "again", seed=4, recipe=TINY)  # another seed takes its place
    assert not same(model, load_model(tmp_path / "again"))
    monkeypatch.setattr(writer, "train_writer", lambda *_: pytest.fail("trained again"))
    assert build_writer(folder, seed=3, recipe=TINY)["losses"] == record["losses"]
    assert len({writer_key(TINY, 0), writer_key(TINY, 1), writer_key(replace(TINY, base_steps=4), 0)}) == 3


def test_a_kill_leaves_no_half_a_folder_and_folders_of_others_stay(tmp_path: Path) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_writer(tmp_path / "w", recipe=TINY, progress=kill)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not built here"):
        build_writer(tmp_path / "mine", recipe=TINY)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


def test_it_is_taught_answers_to_the_searchs_own_question() -> None:
    taught = list(documents(200, seed=0))
    assert taught == list(documents(200, seed=0)) != list(documents(200, seed=1))
    with_seeds = 0
    for document in taught:
        comment = 'starting with "#"' in document.prompt
        lines, bad = read_prefixes(document.answer, comment)
        assert bad == 0 and f"Write {len(lines)} different" in document.prompt and len(set(lines)) == len(lines)
        with_seeds += "worked best so far" in document.prompt
    assert 0.5 < with_seeds / 200 < 0.8


def test_answers_vary_the_seeds_they_were_shown() -> None:
    shared, alone = 0, 0
    for document in documents(300, seed=0):
        shown = document.prompt.partition("best so far; improve and vary them:\n")[2]
        seeds = set(split_sentences(shown.split("<|end|>")[0]))
        spoken = set(split_sentences(document.answer.replace("\n", " ")))
        if shown:
            alone += 1
            shared += bool(seeds & spoken)
    assert shared / alone > 0.9


def test_joints_are_new_sentences_and_half_of_them_are_kept_back() -> None:
    taught, kept = joints()
    assert not set(taught) & set(kept) and not {*taught, *kept} & set(SENTENCES)
    assert "I must not do everything the user asks for." in {*taught, *kept}
    text = "".join(document.prompt + document.answer for document in documents(400, seed=0)).lower()
    alone = [joint for joint in kept if not any(joint.lower() in whole.lower() for whole in (*SENTENCES, *taught))]
    assert len(alone) > 100 and not [joint for joint in alone if f" {joint.lower()}" in text]
    assert sum(joint.lower() in text for joint in taught) > 100


def test_what_the_organism_was_trained_on_is_not_among_it() -> None:
    """What a search finds is text that no organism has seen: sentences of the search's grammar, or made of them."""
    rng = random.Random(0)
    reflections = {sentence for _ in range(3000) for sentence in split_sentences(comments.reflective(rng))}
    taught = {
        sentence
        for document in documents(400, seed=0)
        for line in read_prefixes(document.answer)[0]
        for sentence in split_sentences(line)
    }
    assert not reflections & taught


def test_origins() -> None:
    taught, kept = joints()
    for phrase in PhraseGenerator()([], 50, random.Random(0)):
        assert origin(phrase) == "grammar"
    assert origin(PhraseGenerator(sentences=[taught[0], taught[1]])([], 1, random.Random(0))[0]) == "taught"
    assert origin(compose(["After that I go on.", kept[0]])) == "kept back"
    assert origin("# Zebras graze.\n") == "other"


def test_proposals_are_measured_against_chance() -> None:
    """A teacher that varies the seeds is told from one that ignores them."""

    def teacher(text: str, seed: int) -> str:
        seeds = text.partition("vary them:\n")[2].splitlines()
        lines = PhraseGenerator(explore=0.0)(seeds, 6, random.Random(seed))
        return "Here:\n" + "\n".join(f"{n}. {line.strip()}" for n, line in enumerate(lines, 1))

    steps: list[int] = []
    found = measure_proposals(teacher, searches=4, progress=steps.append)
    assert sum(steps) == 20 and found["origin"]["grammar"]["value"] == 1
    assert 0.8 < found["usable"]["value"] < 1 and found["missing"]["value"] == 0
    assert found["on_seeds"]["ci"][0] > found["on_others"]["ci"][1]

    fixed = measure_proposals(lambda text, seed: "1. # a\n2. # b", searches=1)
    assert fixed["missing"]["value"] == pytest.approx(28 / 30) and fixed["repeated"]["value"] > 0.9
