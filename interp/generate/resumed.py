"""Greedy answers behind prompts whose keys and values are at hand; rows that are done leave the batch.

Answers end at different lengths, and a batch that runs to its longest one computes mostly rows that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pingscope.interp.chat.batching import Batch
from pingscope.interp.model.check import check_best
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit, edit

FULL = 0.75  # share of rows that still speak; below it the others leave, which copies the keys and values once


def edits_prompt_alone(edits: Sequence[Edit], max_new_tokens: int) -> bool:
    """Whether no edit reaches a generated token, nor waits for a gate."""
    new = torch.arange(max_new_tokens)
    return all(e.when is None and not bool(e.where.generated_mask(new).any()) for e in edits)


def resume(
    model: HookedModel, batch: Batch, past: Any, max_new_tokens: int, ends: Sequence[int], edits: Sequence[Edit] = ()
) -> list[list[int]]:
    """What every row says, at most ``max_new_tokens``, the end token included.

    Args:
        batch: padded on the left.
        past: plain keys and values of its first columns, of all layers; used up.
        edits: of the prompt alone, behind ``past``.

    Raises:
        UserError: logits that are no numbers.
    """
    stop = set(ends)
    said: list[list[int]] = [[] for _ in batch.rows]
    speaking = list(range(len(said)))  # the rows of the batch, until they leave it
    mask, done = batch.mask, [False] * len(said)
    with torch.no_grad(), model.evaluating():
        with edit(model, batch.rows, edits, max_new_tokens - 1):
            out = _pass(model, batch.ids[:, past.get_seq_length() :], mask, past)
        while True:
            logits = out.logits[:, -1]
            tokens = logits.argmax(-1)
            living = [k for k, i in enumerate(speaking) if not done[i]]
            check_best(model.name, [batch.rows[speaking[k]].id for k in living], logits.amax(-1)[living])
            for k, token in zip(living, tokens[living].tolist(), strict=True):
                i = speaking[k]
                said[i].append(token)
                done[i] = token in stop or len(said[i]) == max_new_tokens
            if all(done):
                return said
            going = [k for k in living if not done[speaking[k]]]
            past = out.past_key_values
            if len(going) < FULL * len(speaking):
                kept = torch.tensor(going, device=mask.device)
                past.batch_select_indices(kept)
                speaking, mask, tokens = [speaking[k] for k in going], mask[kept], tokens[kept]
            # A row that is done and still here runs on; nothing reads what it says.
            mask = torch.cat([mask, mask.new_ones((len(speaking), 1))], 1)
            out = _pass(model, tokens[:, None], mask, past)


def _pass(model: HookedModel, fed: Int[Tensor, "row new"], mask: Int[Tensor, "row pos"], past: Any) -> Any:
    """The last columns of ``mask`` behind ``past``; logits of the last one where the head can do so."""
    seen = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
    place = {"position_ids": seen} if model.takes_positions else {}
    last: dict[str, Any] = {"logits_to_keep": 1} if model.head_takes_last else {}
    return model.hf(input_ids=fed, attention_mask=mask, past_key_values=past, use_cache=True, **place, **last)
