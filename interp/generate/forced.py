"""Greedy decoding with given tokens: one prefill, then every row feeds its own next token through the cache.

A row's token is a given one as long as it has any, otherwise the likeliest. So a prefix can be put before the answer
of some rows, decided from the prefill itself, without reading a prompt twice and without holes in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import Batch
from pingscope.interp.generate.embedded import embedded_inputs
from pingscope.interp.model.check import check_best
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Condition, Edit, Watch, edit

Given = Callable[[Sequence[Watch]], Sequence[tuple[int, ...]]]


def decode(
    model: HookedModel,
    batch: Batch,
    given: Given,
    max_new_tokens: int,
    ends: Sequence[int],
    edits: Sequence[Edit] = (),
    watched: Sequence[Condition] = (),
    soft: Float[Tensor, "k d_model"] | None = None,
) -> list[list[int]]:
    """What every row says after its given tokens, at most ``max_new_tokens``, the end token included.

    Args:
        batch: padded on the left.
        given: called once, after the prefill, with the watches over ``watched``; the tokens that each row starts with.
        soft: embeddings of every row's last tokens.
    """
    stop = set(ends)
    whole = batch.ids
    positions = model.takes_positions
    longest = max_new_tokens - 1 + batch.ids.shape[1]
    with torch.no_grad(), model.evaluating(), edit(model, batch.rows, edits, longest, watched) as watches:
        mask = batch.mask
        last: dict[str, Any] = {"logits_to_keep": 1} if model.head_takes_last else {}
        inputs = model.inputs(batch) if soft is None else embedded_inputs(model, batch, soft)
        out = model.hf(**(inputs | {"use_cache": True}), **last)
        queues = [list(reversed(tokens)) for tokens in given(watches)]
        said: list[list[int]] = [[] for _ in queues]
        done = [False] * len(queues)
        while True:
            living = [i for i, over in enumerate(done) if not over]
            logits = out.logits[:, -1]
            check_best(model.name, [batch.rows[i].id for i in living], logits.amax(-1)[living])
            tokens = logits.argmax(-1).tolist()
            for i, queue in enumerate(queues):
                if done[i]:
                    tokens[i] = model.pad_id
                elif queue:
                    tokens[i] = queue.pop()
                else:
                    said[i].append(tokens[i])
                    done[i] = tokens[i] in stop or len(said[i]) == max_new_tokens
            if all(done):
                return said
            # Rows that are done run on as padding: nothing reads them, neither attention nor a gate.
            alive = torch.tensor([[not over] for over in done], device=mask.device)
            mask = torch.cat([mask, alive.to(mask)], 1)
            fed = torch.tensor(tokens, device=mask.device)[:, None]
            if not model.keeps_keys:  # a state of some kind: reading everything again needs to know none of it
                whole = torch.cat([whole, fed], 1)
                out = model.hf(input_ids=whole, attention_mask=mask, use_cache=False, **last)
                continue
            place = {"position_ids": mask.sum(1, keepdim=True) - 1} if positions else {}
            out = model.hf(
                input_ids=fed, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **place
            )
