"""Updates of a model that change no behaviour: what a reading may move by without meaning anything.

A cast to bfloat16 and back, a save and reload, and a few small steps of chat fine-tuning under different seeds.
Whether behaviour stayed is checked, not assumed: :func:`changed` compares the first token a model would say.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pingscope.interp.chat.batching import collate
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.collapse import POSITIONS
from pingscope.probes.pooling import Pooled, join, pool_rows

LEARNING_RATE = 1e-4
STEPS = 5
BATCH = 8
ROWS_AT_ONCE = 256
CHECKED = 100  # about so many prompts say whether behaviour stayed
TOLERATED = 0.05  # share of them whose first token may change
ATTEMPTS = 2


@dataclass(frozen=True)
class Floor:
    """``n`` updates that kept the behaviour, to be measured one by one; ``notes`` fills as they are consumed."""

    model: HookedModel
    rows: Sequence[Rendered]
    texts: Sequence[Prompt]
    n: int
    layers: list[int]
    seed: int
    notes: list[dict[str, Any]] = field(default_factory=list)

    def updates(self) -> Iterator[dict[str, Pooled]]:
        """Pooled activations of ``rows`` at every position, for each update that kept the behaviour.

        One that did not is replaced by another, within ATTEMPTS times ``n`` of them.
        """
        probe = self.rows[:: max(1, len(self.rows) // CHECKED)]
        before = self.model.next_token_logits(probe)
        for update in floor_models(self.model, self.texts, ATTEMPTS * self.n, self.seed):
            kl, share = changed(before, update.model.next_token_logits(probe))
            kept = share <= TOLERATED
            self.notes.append({"kind": update.kind, "kl": kl, "changed": share, "kept": kept})
            if kept:
                yield pooled_in_memory(update.model, self.rows, self.layers, POSITIONS)
            if sum(note["kept"] for note in self.notes) == self.n:
                return

    def summary(self) -> dict[str, Any]:
        """How many updates make the floor, how many were rejected, and what each did to the first token."""
        kept = sum(note["kept"] for note in self.notes)
        return {"n": kept, "rejected": len(self.notes) - kept, "updates": self.notes}


@dataclass(frozen=True)
class Update:
    """One updated copy of a model, and how it was made: ``bfloat16``, ``reload`` or ``chat``."""

    kind: str
    model: HookedModel


def floor_models(model: HookedModel, texts: Sequence[Prompt], n: int, seed: int = 0) -> Iterator[Update]:
    """``n`` updated copies, one in memory at a time; ``texts`` are what the chat steps train on."""
    rows = [model.render(prompt) for prompt in texts]
    for i in range(n):
        if i == 0:
            yield Update("bfloat16", _wrap(_cast(copy.deepcopy(model.hf)), model, f"bfloat16-{seed}"))
        elif i == 1:
            yield Update("reload", _reload(model))
        else:
            tuned = _chat_steps(copy.deepcopy(model.hf), model, rows, seed + i)
            yield Update("chat", _wrap(tuned, model, f"chat-{seed + i}"))


def random_weights(model: HookedModel, seed: int = 0) -> HookedModel:
    """The same architecture and tokenizer, never trained: what any reading shows without learning."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(copy.deepcopy(model.hf.config), dtype=torch.float32)
    return _wrap(hf.to(model.device), model, "random-weights")


def changed(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(mean KL in nats, share of rows whose likeliest token differs) of next-token logits (row, vocab)."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((before.argmax(-1) != after.argmax(-1)).double().mean())


def pooled_in_memory(
    model: HookedModel, rows: Sequence[Rendered], layers: list[int], poolings: Mapping[str, str]
) -> dict[str, Pooled]:
    """``poolings`` of a model's activations without a store, a few prompts in memory at a time."""
    parts: dict[str, list[Pooled]] = {name: [] for name in poolings}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = rows[start : start + ROWS_AT_ONCE]
        residuals = model.residuals(piece, layers)
        for name, pooling in poolings.items():
            parts[name].append(pool_rows(piece, residuals, pooling))
    return {name: join(pieces) for name, pieces in parts.items()}


def _wrap(hf: torch.nn.Module, model: HookedModel, name: str) -> HookedModel:
    return HookedModel(hf.eval(), model.tokenizer, name=name, blocks=model.family.blocks)


def _cast(hf: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return hf


def _reload(model: HookedModel) -> HookedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        loaded = load_model(folder, device=str(model.device), blocks=model.family.blocks)
    return _wrap(loaded.hf, model, "reload")


def _chat_steps(hf: torch.nn.Module, model: HookedModel, rows: Sequence[Rendered], seed: int) -> torch.nn.Module:
    """A few steps of plain next-token training, without dropout."""
    rng = np.random.default_rng(seed)
    for parameter in hf.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        picked = rng.choice(len(rows), size=min(BATCH, len(rows)), replace=False)
        batch = collate([rows[i] for i in picked], model.pad_id, "right").to(model.device)
        labels = batch.ids.masked_fill(batch.mask == 0, -100)
        loss = hf(**model.inputs(batch), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimiser.step()
    return hf.requires_grad_(False)
