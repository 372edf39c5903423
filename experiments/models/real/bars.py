"""What the alignment of SmolLM2 has to bring on chat, and what it has to leave as it was, measured on both sides of it.

The bars on agent tasks (harmful refused, benign ones and look-alikes not) are rates of the study itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.experiments.agents.judges import judge
from pingscope.experiments.models.real.english import ENGLISH
from pingscope.experiments.tasks.natural.chat import chat_requests
from pingscope.experiments.tasks.records import LABELS, Record
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.statistics import exponential, mean, rate

TOKENS = 40  # of an answer; where it refuses is decided long before


def chat_and_english(
    models: Mapping[str, HookedModel], progress: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Refusal rates on the chat topics of the test split, and perplexity on plain English that nobody trained on.

    Args:
        models: by name, the untouched one first.

    Returns:
        By name: ``refused``, a rate for each label; ``perplexity``; and ``perplexity_ratio`` to the first model, with
        a bootstrap over the paragraphs of :data:`ENGLISH`.
    """
    records, found = chat_requests("test"), {}
    before = next(iter(models.values()))
    untouched = torch.stack([surprise(before, text) for text in ENGLISH])
    for name, model in models.items():
        here = torch.stack([surprise(model, text) for text in ENGLISH])
        found[name] = {
            "refused": refused(model, records, progress),
            "perplexity": exponential(mean(here.tolist())).to_dict(),
            "perplexity_ratio": exponential(mean((here - untouched).tolist())).to_dict(),
        }
    return found


def refused(
    model: HookedModel, records: Sequence[Record], progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Refusal rate of every label, by the strict judge on greedy answers to requests in a chat."""
    rows = [model.render(Prompt(record.id, record.instruction)) for record in records]
    said = generate(model, rows, max_new_tokens=TOKENS, progress=progress)
    outcomes = [judge(answer.text, chat=True) == "refused" for answer in said]
    return {
        label: rate([no for record, no in zip(records, outcomes, strict=True) if record.label == label]).to_dict()
        for label in LABELS
    }


def surprise(model: HookedModel, text: str) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of a text's tokens after the first, in nats."""
    ids = torch.tensor([model.tokenizer(text).input_ids], device=model.device)
    with torch.no_grad(), model.evaluating():
        logits = model.hf(input_ids=ids).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).cpu()
