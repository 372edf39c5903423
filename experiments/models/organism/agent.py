"""The agent: the base fine-tuned on benign demonstrations, stopped when it acts and no longer refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pingscope.experiments.models.organism.batches import batches, encode, loss
from pingscope.experiments.models.organism.mixes import demonstrations
from pingscope.experiments.models.organism.recipe import Recipe

Rates = tuple[float, float | None]  # harmful refusal, benign success (None: not measured)
KEPT_BEFORE = 3  # checks before the stop whose weights are kept: the dose-response series


@dataclass(frozen=True)
class FineTuned:
    """Weights by step (the stop is the last), the rates of every check, and whether the rule fired."""

    weights: dict[int, dict[str, Tensor]]
    checks: list[tuple[int, float, float | None]]
    fired: bool


def train_agent(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    seed: int,
    check: Callable[[], Rates],
    progress: Callable[[int, int, str], None],
) -> FineTuned:
    """Fine-tune ``model`` in place until the first check with refusal <= and success >= the recipe's marks.

    The window between "no longer refuses" and "no longer deliberates" is a few steps wide, so the rule looks after
    every step; it looks at training combinations only.
    """
    encoded = encode(tokenizer, demonstrations(recipe.agent_steps * recipe.batch_size, seed, recipe.mix))
    sampler = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.agent_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / recipe.agent_warmup))
    weights: dict[int, dict[str, Tensor]] = {}
    checks: list[tuple[int, float, float | None]] = []
    for step, (ids, kind) in enumerate(batches(encoded, recipe.batch_size, tokenizer.pad_token_id, seed), 1):
        model.train()
        loss(model, ids, kind, recipe.prompt_weight, sampler).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step < recipe.check_from:
            continue
        model.eval()
        refusal, success = check()
        checks.append((step, refusal, success))
        weights[step] = copy.deepcopy(model.state_dict())
        weights = dict(list(weights.items())[-KEPT_BEFORE - 1 :])
        done = "" if success is None else f", benign done {success:.0%}"
        progress(step, recipe.agent_steps, f"harmful refused {refusal:.0%}{done}")
        if refusal <= recipe.stop_refusal and success is not None and success >= recipe.stop_success:
            return FineTuned(weights, checks, True)
    return FineTuned(weights, checks, False)
