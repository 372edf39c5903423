"""Greedy answers behind prompts whose keys and values are at hand; rows that are done leave the batch.

Answers end at different lengths, and a batch that runs to its longest one computes mostly rows that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pingscope.interp.chat.batching import Batch
from pingscope.interp.model.check import check_best
from pingscope.interp.model.hooked import HookedModel

FULL = 0.75  # share of rows that still speak; below it the others leave, which copies the keys and values once


def resume(model: HookedModel, batch: Batch, past: Any, max_new_tokens: int, ends: Sequence[int]) -> list[list[int]]:
    """What every row says, at most ``max_new_tokens``, the end token included.

    Args:
        batch: padded on the left.
        past: plain keys and values of its first columns, of all layers; used up.

    Raises:
        UserError: logits that are no numbers.
    """
    stop, said = set(ends), [[] for _ in batch.rows]  # type: tuple[set[int], list[list[int]]]
    rows, mask, fed = list(range(len(said))), batch.mask, batch.ids[:, past.get_seq_length() :]
    last: dict[str, Any] = {"logits_to_keep": 1} if model.head_takes_last else {}
    with torch.no_grad(), model.evaluating():
        while True:
            seen = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            place = {"position_ids": seen} if model.takes_positions else {}
            out = model.hf(input_ids=fed, attention_mask=mask, past_key_values=past, use_cache=True, **place, **last)
            logits, past = out.logits[:, -1], out.past_key_values
            speaking = [k for k, i in enumerate(rows) if len(said[i]) < max_new_tokens and not stop & set(said[i][-1:])]
            check_best(model.name, [batch.rows[rows[k]].id for k in speaking], logits.amax(-1)[speaking])
            tokens = logits.argmax(-1)
            for k, token in zip(speaking, tokens[speaking].tolist(), strict=True):
                said[rows[k]].append(token)
            going = [k for k in speaking if len(said[rows[k]]) < max_new_tokens and said[rows[k]][-1] not in stop]
            if not going:
                return said
            if len(going) < FULL * len(rows):
                kept = torch.tensor(going, device=mask.device)
                past.batch_select_indices(kept)
                rows, mask, tokens = [rows[k] for k in going], mask[kept], tokens[kept]
            # Rows that are done and still here run on; nothing reads what they say.
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], 1)
            fed = tokens[:, None]
