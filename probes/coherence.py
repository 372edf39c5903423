"""Segment coherence (SC-TopK, arXiv 2604.14865): a token probe trained on its most harmful stretches.

A prompt's training logit is the mean of its K largest windows of M tokens; on benign prompts the loss also punishes
logits that vary among the tokens that look harmful, so that single tokens do not fire. At reading time the logits are
smoothed along the prompt and the largest counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WINDOW = 16
TOP = 8
VARIANCE = 0.01  # weight of the coherence term
TEMPERATURE = 2.0
SMOOTHING = 0.1
STEPS = 300
RATE = 1e-2
DECAY = 1e-2

Sequences = Sequence[np.ndarray]  # (token, d_model) each, of different lengths


@dataclass(frozen=True)
class Coherence:
    """w and b in raw space."""

    direction: Float[np.ndarray, " d_model"]
    intercept: float

    @classmethod
    def fit(cls, sequences: Sequences, positive: np.ndarray, start: tuple[np.ndarray, float]) -> Coherence:
        """Full-batch Adam from ``start``, a probe's direction and intercept, on standardised tokens; deterministic."""
        tokens = np.concatenate(sequences).astype(np.float64)
        centre, scale = tokens.mean(0), tokens.std(0)
        scale[scale == 0] = 1.0
        longest = max(map(len, sequences))
        x = torch.zeros(len(sequences), longest, tokens.shape[1], dtype=torch.float32)
        mask = torch.zeros(len(sequences), longest)
        for i, sequence in enumerate(sequences):
            x[i, : len(sequence)] = torch.as_tensor((sequence - centre) / scale)
            mask[i, : len(sequence)] = 1
        y = torch.as_tensor(positive.astype(np.float32))
        w = torch.tensor(start[0] * scale, dtype=torch.float32, requires_grad=True)
        b = torch.tensor(start[1] + start[0] @ centre, dtype=torch.float32, requires_grad=True)
        optimiser = torch.optim.AdamW(
            [{"params": [w], "weight_decay": DECAY}, {"params": [b], "weight_decay": 0.0}], lr=RATE
        )
        with torch.enable_grad():
            for _ in range(STEPS):
                loss = _loss(x @ w + b, mask, y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        direction = w.detach().numpy().astype(np.float64) / scale
        return cls(direction, float(b.detach()) - float(direction @ centre))

    def score(self, x: Float[np.ndarray, "token d_model"]) -> float:
        """Largest smoothed logit; smoothing starts at the first token's own."""
        smooth, top = None, -np.inf
        for z in x @ self.direction + self.intercept:
            smooth = z if smooth is None else SMOOTHING * z + (1 - SMOOTHING) * smooth
            top = max(top, float(smooth))
        return top


def _loss(z: Float[Tensor, "prompt token"], mask: Float[Tensor, "prompt token"], y: Float[Tensor, " prompt"]) -> Tensor:
    windows = min(WINDOW, z.shape[1])
    kernel = torch.ones(1, 1, windows)
    total = torch.nn.functional.conv1d((z * mask)[:, None], kernel)[:, 0]
    size = torch.nn.functional.conv1d(mask[:, None], kernel)[:, 0]
    # A prompt shorter than the window is one window; of others only whole windows count.
    whole = size >= torch.minimum(mask.sum(1, keepdim=True), torch.tensor(float(windows)))
    mean = total / size.clamp(min=1)
    ranked = mean.masked_fill(~whole, -torch.inf).topk(min(TOP, mean.shape[1]), dim=1).values
    there = torch.isfinite(ranked)
    logit = ranked.masked_fill(~there, 0.0).sum(1) / there.sum(1)
    p = torch.sigmoid(mean / TEMPERATURE) * whole
    middle = (p * mean).sum(1, keepdim=True) / p.sum(1, keepdim=True)
    variance = (p * (mean - middle) ** 2).sum(1) / p.sum(1)
    fit = torch.nn.functional.binary_cross_entropy_with_logits(logit, y)
    return fit + VARIANCE * ((1 - y) * variance).mean()
