"""Greedy decoding step by step: one prefill, then every row feeds its own next token through the cache.

A row's token is a given one as long as it has any, otherwise the likeliest. So a prefix can be put before the answer
of some rows, decided from the prefill itself, without reading a prompt twice and without holes in the cache.

Answers end at different lengths. Behind keys and values that were at hand, rows that are done leave the batch: run to
its longest answer, it would compute mostly rows that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pingscope.interp.chat.batching import Batch
from pingscope.interp.generate.embedded import embedded_inputs
from pingscope.interp.model.check import check_best
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Condition, Edit, Watch, edit

Given = Callable[[Sequence[Watch]], Sequence[tuple[int, ...]]]

FULL = 0.75  # share of rows that still speak; below it the others leave, which copies the keys and values once


def edits_prompt_alone(edits: Sequence[Edit], max_new_tokens: int) -> bool:
    """Whether no edit reaches a generated token, nor waits for a gate."""
    new = torch.arange(max_new_tokens)
    return all(e.when is None and not bool(e.where.generated_mask(new).any()) for e in edits)


def decode(
    model: HookedModel,
    batch: Batch,
    given: Given,
    max_new_tokens: int,
    ends: Sequence[int],
    edits: Sequence[Edit] = (),
    watched: Sequence[Condition] = (),
    soft: Float[Tensor, "k d_model"] | None = None,
    past: Any = None,
) -> list[list[int]]:
    """What every row says after its given tokens, at most ``max_new_tokens``, the end token included.

    Args:
        batch: padded on the left.
        given: called once, after the prefill, with the watches over ``watched``; the tokens that each row starts with.
        soft: embeddings of every row's last tokens.
        past: plain keys and values of the batch's first columns, of all layers; used up. ``edits`` are then of the
            prompt alone, behind them.

    Raises:
        UserError: logits that are no numbers.
    """
    stop, longest = set(ends), max_new_tokens - 1 + batch.ids.shape[1]
    said: list[list[int]] = [[] for _ in batch.rows]
    done, here = [False] * len(said), list(range(len(said)))  # here: the rows that the batch still holds
    whole, mask = batch.ids, batch.mask
    with torch.no_grad(), model.evaluating(), ExitStack() as hooks:
        watches = hooks.enter_context(edit(model, batch.rows, edits, longest, watched))
        out = _read(model, batch, soft, past)
        queues = [list(reversed(tokens)) for tokens in given(watches)]
        if past is not None:
            hooks.close()  # they follow a batch of these rows, and have nothing more to do
        while True:
            living = [k for k, i in enumerate(here) if not done[i]]
            logits = out.logits[:, -1]
            check_best(model.name, [batch.rows[here[k]].id for k in living], logits.amax(-1)[living])
            tokens = logits.argmax(-1).tolist()
            for k, i in enumerate(here):
                if done[i]:
                    tokens[k] = model.pad_id
                elif queues[i]:
                    tokens[k] = queues[i].pop()
                else:
                    said[i].append(tokens[k])
                    done[i] = tokens[k] in stop or len(said[i]) == max_new_tokens
            if all(done):
                return said
            going = [k for k in living if not done[here[k]]]
            if past is not None and len(going) < FULL * len(here):
                kept = torch.tensor(going, device=mask.device)
                out.past_key_values.batch_select_indices(kept)
                here, tokens, mask = [here[k] for k in going], [tokens[k] for k in going], mask[kept]
            # Rows that are done and still here run on as padding: nothing reads them, neither attention nor a gate.
            alive = torch.tensor([[not done[i]] for i in here], device=mask.device)
            mask = torch.cat([mask, alive.to(mask)], 1)
            fed = torch.tensor(tokens, device=mask.device)[:, None]
            if model.keeps_keys:
                out = _behind(model, fed, mask, out.past_key_values)
            else:  # a state of some kind: reading everything again needs to know none of it
                whole = torch.cat([whole, fed], 1)
                out = model.hf(input_ids=whole, attention_mask=mask, use_cache=False, **_last(model))


def _read(model: HookedModel, batch: Batch, soft: Tensor | None, past: Any) -> Any:
    """The forward pass that reads the prompts, or what of them is not in ``past``."""
    if past is not None:
        return _behind(model, batch.ids[:, past.get_seq_length() :], batch.mask, past)
    inputs = model.inputs(batch) if soft is None else embedded_inputs(model, batch, soft)
    return model.hf(**(inputs | {"use_cache": True}), **_last(model))


def _behind(model: HookedModel, fed: Int[Tensor, "row new"], mask: Int[Tensor, "row pos"], past: Any) -> Any:
    """The last columns of ``mask`` behind ``past``."""
    seen = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
    place = {"position_ids": seen} if model.takes_positions else {}
    return model.hf(input_ids=fed, attention_mask=mask, past_key_values=past, use_cache=True, **place, **_last(model))


def _last(model: HookedModel) -> dict[str, Any]:
    """Logits of the last column alone, where the head can do so."""
    return {"logits_to_keep": 1} if model.head_takes_last else {}
