"""Embeddings in the place of tokens: a prefix of the answer that need not be text.

Rows carry placeholder tokens of role ``prefix``, so that positions, masks and selections are those of any prefix. Their
embeddings are exchanged where the model itself looks its tokens up: what Hugging Face takes as ``inputs_embeds`` is the
output of the embedding module, with the scaling that some families apply there (Gemma), before positions are added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pingscope.interp.chat.batching import Batch
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel


def with_placeholders(row: Rendered, k: int, pad_id: int) -> Rendered:
    """The row with ``k`` tokens at its end whose embeddings will be given."""
    return replace(row, ids=row.ids + (pad_id,) * k, roles=row.roles + ("prefix",) * k)


def placeholders(batch: Batch, k: int) -> Bool[Tensor, "batch pos"]:
    """The last ``k`` tokens before each row's response, in a batch padded on the left."""
    mask = torch.zeros_like(batch.mask, dtype=torch.bool)
    width = batch.ids.shape[1]
    for i, row in enumerate(batch.rows):
        end = width - len(row) + row.n_prompt
        mask[i, end - k : end] = True
    return mask


def token_embeddings(model: HookedModel, ids: Any) -> Float[Tensor, "*shape d_model"]:
    """What the model makes of tokens before it adds positions, in its own dtype."""
    return model.hf.get_input_embeddings()(torch.as_tensor(ids, device=model.device))


def embedded_inputs(model: HookedModel, batch: Batch, embeddings: Float[Tensor, "k d_model"]) -> dict[str, Any]:
    """Keyword arguments of a forward pass in which ``embeddings`` stand in every row's placeholders.

    Gradients flow into ``embeddings`` (any dtype; they are cast to the model's).
    """
    inputs = model.inputs(batch)
    known = token_embeddings(model, inputs.pop("input_ids")).detach()
    at = placeholders(batch, len(embeddings))
    given = embeddings.to(known).repeat(len(batch.rows), 1)
    return inputs | {"inputs_embeds": known.masked_scatter(at[..., None], given)}


def check_embedded(model: HookedModel) -> None:
    """Refuse a model that reads embeddings otherwise than the tokens they belong to.

    Raises:
        UserError: weights on another machine, or a family that needs the ids themselves (embeddings of every layer).
    """
    if model.backend != "hf" or model.remote:
        raise UserError(f"{model.name}: a soft prefix needs the model here as Hugging Face runs it; load it so")
    row = model.render(Prompt("embedded", "Is this safe?"))
    batch = model.batch([row], side="left")
    k = min(4, len(row))
    with torch.no_grad(), model.evaluating():
        plain = model.hf(**model.inputs(batch)).logits[:, -1].float()
        try:
            given = embedded_inputs(model, batch, token_embeddings(model, row.ids[-k:]))
            same = model.hf(**given).logits[:, -1].float()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(error).__name__
            raise UserError(f"{model.name}: takes no embeddings in place of tokens ({kind}); leave it out") from error
    if not torch.allclose(plain, same, atol=1e-3 * float(plain.abs().max())):
        raise UserError(f"{model.name}: reads embeddings otherwise than their tokens; a soft prefix would mislead")
