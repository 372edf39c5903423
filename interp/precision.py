"""Which precision to compute in: bfloat16 where it is quicker here and what the model predicts stays, else float32."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

# Predictions at every position of this text are compared; a chat template is none of its business.
SAMPLE = (
    "The keys to the old house were on the table. She asked me to read the letter aloud, send a copy to the office by "
    "9:30, and write down what I could not understand: two names, a date, and the price of the ticket (45.20)."
)
# Half the summed change of probability at a position, on average over the text: what rounding to 8 bits moves.
MOST_MOVED = 0.05
ROWS, PASSES = 4, 3  # what is timed


def choose_precision(hf: Any, tokenizer: Any) -> str:
    """Cast the weights of a model in float32 to bfloat16 if that holds here; says what was chosen and why.

    Buffers (rotary frequencies) stay as they are, as they do when a checkpoint is loaded in bfloat16.
    """
    device = next(hf.parameters()).device
    instructions = _bfloat16_on(device)
    if not instructions:
        return f"float32, because {'this CPU' if device.type == 'cpu' else device} has no bfloat16 instructions"
    ids = torch.tensor([tokenizer(SAMPLE).input_ids], device=device)
    before, seconds = _predicted(hf, ids), _seconds(hf, ids)
    kept = [(weight, weight.data) for weight in hf.parameters()]
    for weight, numbers in kept:
        weight.data = numbers.to(torch.bfloat16)
    moved = float((_predicted(hf, ids) - before).abs().sum(-1).mean() / 2)
    percent = f"{100 * moved:.1f}% of the probability of a next token"
    times = _seconds(hf, ids) / seconds  # having the instructions is not yet to be quicker
    if times < 1 and moved <= MOST_MOVED:  # not so with NaN either
        hf.config.dtype = torch.bfloat16
        return f"bfloat16, because {instructions} computes in it {1 / times:.1f} times as fast and it moves {percent}"
    for weight, numbers in kept:
        weight.data = numbers
    if times >= 1:
        return f"float32, because bfloat16 takes {times:.1f} times as long here"
    return f"float32, because bfloat16 moves {percent}"


@torch.no_grad()
def _predicted(hf: Any, ids: Tensor) -> Tensor:
    """Probabilities of the next token at every position."""
    return hf(ids, use_cache=False).logits[0].float().softmax(-1)


@torch.no_grad()
def _seconds(hf: Any, ids: Tensor) -> float:
    """The best of a few passes over a small batch, after one that warms up."""
    batch, best = ids.expand(ROWS, -1), math.inf
    for number in range(PASSES + 1):
        began = time.perf_counter()
        hf(batch, use_cache=False).logits[0, -1, 0].item()  # waits for a device that computes in the background
        best = min(best, time.perf_counter() - began) if number else best
    return best


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes in a number format by instructions of its own."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(_bfloat16_on(device)))


def _bfloat16_on(device: torch.device) -> str:
    """What computes in bfloat16 there; empty if nothing does: emulated, it is slower than float32."""
    if device.type == "cuda":
        return "this GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    probes = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    for name, probe in probes.items():
        asked = getattr(torch.cpu, probe, None)  # not public: may be gone in another release
        if device.type == "cpu" and asked is not None and asked():
            return f"this CPU ({name})"
    return ""
