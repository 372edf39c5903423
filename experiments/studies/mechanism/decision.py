"""The decision at the final token as one number: the log-odds that the answer begins with a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.beginnings import token_classes, where_answers_differ
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit


def refusal_tokens(model: HookedModel, refusals: Sequence[str] = ()) -> list[int]:
    """First tokens of refusals; ``refusals`` are examples in the model's own words, default: common ones."""
    classes = token_classes(model.tokenizer, **({"refusals": refusals} if refusals else {}))
    if not classes["refusal"]:
        raise UserError(
            f"{model.name}: no token begins refusals alone (the tokenizer starts actions or comments with it too); "
            "give beginnings of refusals in the model's own words"
        )
    return list(classes["refusal"])


def log_odds_of(ids: Sequence[int]) -> Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]:
    """log P(next token in ``ids``) - log P(any other), natural logarithm, differentiable."""

    def log_odds(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        inside[list(ids)] = True
        return logits[:, inside].logsumexp(-1) - logits[:, ~inside].logsumexp(-1)

    return log_odds


def refusal_log_odds(
    model: HookedModel,
    rows: Sequence[Rendered],
    ids: Sequence[int],
    edits: Sequence[Edit] = (),
    prompts: PromptCache | None = None,
) -> np.ndarray:
    """Refusal log-odds after every prompt: (row,). ``prompts`` keeps what edits near its end leave as it was."""
    rows = where_answers_differ(model, rows)
    return log_odds_of(ids)(model.next_token_logits(rows, edits, prompts=prompts).double()).numpy()
