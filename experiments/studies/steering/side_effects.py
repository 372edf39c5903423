"""What an intervention does to text that should stay as it is: KL from the untouched model, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit, edit, live_edits
from pingscope.probes.statistics import exponential, mean

SHORT_BUDGET = 4096  # slots of one batch: all logits of all positions are in memory at once


def coherence(model: HookedModel, rows: Sequence[Rendered], edits: Sequence[Edit]) -> dict[str, dict[str, Any]]:
    """``kl`` (nats a token) and ``perplexity`` of reference responses under ``edits``, with 95% intervals over rows.

    Args:
        rows: benign prompts rendered with their reference response; its tokens alone are read, each predicted from
            those before it. KL(untouched || edited) and the negative log-likelihood are averaged within each row.

    Returns:
        ``kl``, ``perplexity`` and ``perplexity_before``; rows without a response are missing.
    """
    kl: list[float | None] = [None] * len(rows)
    after: list[float | None] = [None] * len(rows)
    before: list[float | None] = [None] * len(rows)
    for order in token_budget_batches([len(row) for row in rows], SHORT_BUDGET):
        here = [rows[i] for i in order]
        plain, edited = (_log_probabilities(model, here, which) for which in ((), edits))
        for i, row, p, q in zip(order, here, plain, edited, strict=True):
            said = torch.tensor(row.ids[row.n_prompt :])
            if not len(said):
                continue
            kl[i] = float((p.exp() * (p - q)).sum(-1).mean())
            before[i], after[i] = (float(-x.gather(-1, said[:, None]).mean()) for x in (p, q))
    return {
        "kl": mean(kl).to_dict(),
        "perplexity": exponential(mean(after)).to_dict(),
        "perplexity_before": exponential(mean(before)).to_dict(),
    }


def _log_probabilities(model: HookedModel, rows: Sequence[Rendered], edits: Sequence[Edit]) -> list[Tensor]:
    """(response token, vocab), float64, of every row: what each response token was predicted from."""
    batch = model.batch(rows, side="right")
    live = live_edits(edits, rows)
    with torch.no_grad(), model.evaluating(), edit(model, rows, live):
        logits = model.hf(**model.inputs(batch)).logits
    return [logits[j, row.n_prompt - 1 : len(row) - 1].double().log_softmax(-1).cpu() for j, row in enumerate(rows)]
