"""What a language model's answers are worth to a search: usable, new, and built on the seeds it is shown.

Measured on searches without scores: seeds are drawn at random from what the generator itself proposed before, so the
figures describe the generator and know of no model that is searched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from pingscope.experiments.cli.tables import percent, print_table
from pingscope.experiments.models.writer_texts import ORIGINS, origin
from pingscope.probes.statistics import rate
from pingscope.steering.generators import Ask, ModelGenerator
from pingscope.steering.phrases import split_sentences
from pingscope.steering.ping import DEFAULT

SEEDS = 5  # shown from the second round on; a search shows k to 3 k


def measure_proposals(
    ask: Ask, *, searches: int = 8, seed: int = 0, progress: Callable[[int], object] = lambda n: None
) -> dict[str, Any]:
    """Shares with Wilson's intervals, over all lines of ``searches`` searches of the default rounds.

    Returns:
        ``usable`` of all lines; ``repeated`` of the usable ones (the same words earlier in the search); ``missing`` of
        the prefixes that rounds wanted; ``origin`` of the proposals, see
        :func:`experiments.models.writer_texts.origin`;
        ``on_seeds``: of the proposals after seeds, those with a sentence of these seeds, and ``on_others`` with one of
        as many proposals of another search, which is what chance gives.
    """
    usable: list[bool] = []
    repeated: list[bool] = []
    missing: list[bool] = []
    origins: list[str] = []
    shown: list[tuple[set[str], set[str]]] = []  # sentences of the proposal, and of the seeds
    for number in range(searches):
        rng = random.Random(f"{seed}/{number}")
        generator = ModelGenerator(ask)
        found: list[str] = []
        for _ in range(DEFAULT.T):
            seeds = rng.sample(found, min(SEEDS, len(found)))
            new = generator(seeds, DEFAULT.M, rng)
            missing += [place >= len(new) for place in range(DEFAULT.M)]
            known = {sentence for one in seeds for sentence in split_sentences(one)}
            shown += [(set(split_sentences(one)), known) for one in new if seeds]
            found += new
            progress(1)
        usable += [True] * generator.usable + [False] * generator.malformed
        repeated += [True] * generator.repeated + [False] * (generator.usable - generator.repeated)
        origins += map(origin, found)
    half = len(shown) // 2
    others = [known for _, known in shown[half:] + shown[:half]]
    return {
        "usable": rate(usable).to_dict(),
        "repeated": rate(repeated).to_dict(),
        "missing": rate(missing).to_dict(),
        "origin": {name: rate([one == name for one in origins]).to_dict() for name in ORIGINS},
        "on_seeds": rate([bool(spoken & known) for spoken, known in shown]).to_dict(),
        "on_others": rate([bool(s & known) for (s, _), known in zip(shown, others, strict=True)]).to_dict(),
    }


def print_proposals(found: Mapping[str, Any]) -> None:
    rows = [
        ("usable lines", found["usable"]),
        ("of these, the same words again", found["repeated"]),
        ("prefixes wanted and not given", found["missing"]),
        *((f"proposals: {ORIGINS[name]}", found["origin"][name]) for name in ORIGINS),
        ("after seeds: with a sentence of theirs", found["on_seeds"]),
        ("… with a sentence of other seeds (chance)", found["on_others"]),
    ]
    print_table(
        ["share, %", "[95% interval]", "n"],
        [[name, percent(cell), str(cell["n"])] for name, cell in rows],
        "on searches without scores",
    )
