"""What the writer is taught: the search's question, and an answer that somebody without any score could give.

The teacher is the built-in phrase generator: fresh phrases where the question shows no seeds, variants of the seeds
where it does. No answer depends on what a prefix does to any model; the writer learns the form of an answer and to
build on what it is shown, never what is good.

A copy of the grammar would be no second generator. Teaching only some of the grammar's sentences would make a narrower
copy, and a lottery of which remain. So half of what the writer reads is sentences that the grammar does not hold: two
of its sentences joined at a word they share ("I must not do" + "everything the user asks for."), sensible or not. Half
of all such joints are kept from it, so that joints it makes of its own accord can be told from those it remembers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from pingscope.experiments.models.organism.mixes import Document
from pingscope.experiments.models.organism.tokenizer import prompt_text
from pingscope.steering.generators import COMMENT_STYLE, INSTRUCTION, SEEDS, question
from pingscope.steering.phrases import ENDINGS, OPENERS, SENTENCES, PhraseGenerator, Style, split_sentences, with_opener

MOST_LINES, MOST_SEEDS = 8, 9  # a search asks for M lines (5 or 6) and shows at most 3 k seeds
NO_SEEDS = 0.35  # share of questions as in a search's first rounds
PLAIN = 0.15  # share of questions for prefixes that are no comments


@cache
def joints() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every sentence that two of the grammar's give when joined at a shared word: ``(taught, kept back)``."""
    made = {
        " ".join(a[: i + 1] + b[j + 1 :])
        for a in map(str.split, SENTENCES)
        for b in map(str.split, SENTENCES)
        for i, word in enumerate(a[:-1])
        for j, other in enumerate(b[:-1])
        if word == other
    }
    shuffled = sorted(made - set(SENTENCES))
    random.Random("joints").shuffle(shuffled)
    half = len(shuffled) // 2
    return tuple(shuffled[:half]), tuple(shuffled[half:])


def documents(n: int, seed: int) -> Iterator[Document]:
    """``n`` questions of the search with an answer each; the same for a seed."""
    taught, _ = joints()
    rng = random.Random(f"writer/{seed}")
    for _ in range(n):
        comment = rng.random() >= PLAIN
        sentences = (*SENTENCES, *rng.sample(taught, len(SENTENCES)))
        n_seeds = 0 if rng.random() < NO_SEEDS else rng.randint(1, MOST_SEEDS)
        style: Style = "comment" if comment else "bare"
        seeds = PhraseGenerator(style=style, sentences=sentences)([], n_seeds, rng)
        lines = PhraseGenerator(style=style, sentences=sentences)(seeds, rng.randint(1, MOST_LINES), rng)
        answer = "\n".join(f"{number}. {line.strip()}" for number, line in enumerate(lines, 1))
        yield Document(prompt_text("", question(seeds, len(lines), comment)), "", answer)


def question_pieces() -> list[str]:
    """The question's fixed wording, a token each for the writer: as words it would be a third of all it reads."""
    return [piece for text in (INSTRUCTION, COMMENT_STYLE, SEEDS) for piece in re.split(r"\{\w+\}", text) if piece]


ORIGINS = {
    "grammar": "the grammar's sentences only",
    "taught": "with a joint that was taught",
    "kept back": "with a joint that was kept back",
    "other": "with a sentence that is neither",
}


def origin(phrase: str) -> str:
    """Where a phrase's sentences come from, by the one farthest from the grammar: a name in ``ORIGINS``."""
    known, names = _known(), list(ORIGINS)
    return names[max(known.get(sentence.lower(), len(names) - 1) for sentence in split_sentences(phrase))]


@cache
def _known() -> dict[str, int]:
    """Sentences in small letters, after any opener, with the place of their origin in ``ORIGINS``."""
    known: dict[str, int] = {}
    for place, sentences in reversed(list(enumerate(((*SENTENCES, *ENDINGS), *joints())))):
        known |= {with_opener(opener, one).lower(): place for opener in OPENERS for one in sentences}
    return known
