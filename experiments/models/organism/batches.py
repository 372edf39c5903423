"""Documents to padded batches with a loss weight for every token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from pingscope.experiments.models.organism.mixes import Document

SORTED_BATCHES = 16  # documents are sorted by length within this many batches: padding is wasted time
PROMPT_SAMPLE = 0.25


@dataclass(frozen=True)
class Encoded:
    """Token ids, and how many of them the model is only shown (the prompt and a given comment)."""

    ids: list[int]
    n_given: int


def encode(tokenizer: Any, documents: Sequence[Document]) -> list[Encoded]:
    """Prompt, given comment and answer are tokenised apart, so that the prompt's ids are those of evaluation."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    prompts, given = ids([d.prompt for d in documents]), ids([d.given for d in documents])
    answers = ids([d.answer for d in documents])
    end = tokenizer.eos_token_id
    return [
        Encoded(p + g + a + ([end] if d.closed else []), len(p) + len(g))
        for d, p, g, a in zip(documents, prompts, given, answers, strict=True)
    ]


def batches(encoded: Sequence[Encoded], batch_size: int, pad_id: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``(ids, kind)`` pairs, both ``(row, token)``; kind is 1 for the prompt, 2 for the answer, 0 for padding."""
    rng = random.Random(f"batches/{seed}")
    group = batch_size * SORTED_BATCHES
    for start in range(0, len(encoded), group):
        rows = sorted(encoded[start : start + group], key=lambda item: len(item.ids))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(row.ids) for row in chunk)
            ids = torch.full((len(chunk), width), pad_id)
            kind = torch.zeros((len(chunk), width), dtype=torch.long)
            for i, row in enumerate(chunk):
                ids[i, : len(row.ids)] = torch.tensor(row.ids)
                kind[i, : row.n_given] = 1
                kind[i, row.n_given : len(row.ids)] = 2
            yield ids, kind


def loss(
    model: Any,
    ids: Int[Tensor, "row token"],
    kind: Int[Tensor, "row token"],
    prompt_weight: float,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean loss of the answers + ``prompt_weight`` x mean loss of a random quarter of what was given.

    The prompt's loss is a light regulariser: a sample of it is as good, and the wide softmax is a third of a step.
    """
    # Padding stands on the right, so the causal mask alone keeps it out of every real token's sight.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    target, kind = ids[:, 1:].flatten(), kind[:, 1:].flatten()
    sampled = (kind == 1) & (torch.rand(kind.shape, generator=generator) < PROMPT_SAMPLE)
    kept = ((kind == 2) | sampled).nonzero()[:, 0]
    logits = model.lm_head(hidden.index_select(0, kept))
    losses, answer = cross_entropy(logits, target[kept], reduction="none"), kind[kept] == 2
    prompt = losses[~answer].sum() / (~answer).sum().clamp(min=1)
    return losses[answer].sum() / answer.sum().clamp(min=1) + prompt_weight * prompt
