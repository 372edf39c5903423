"""A soft prefix: embeddings in front of the answer that are trained while the model stays as it is.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) at the start of the response. No text of k tokens can do more than
the best k embeddings, since its own are among them: what they do on unseen tasks is an upper bound for what a search
over such texts could have found, as far as the training reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_json, sha256_of, write_json
from pingscope.interp.generate.embedded import check_embedded, token_embeddings
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.answer_loss import BATCH, Example, answer_losses, mean_loss, sides

KEPT = 2**30  # bytes of prompts' keys and values; every step needs them again
RATE = 0.1  # of Adam, in units of the embeddings' root mean square


@dataclass(frozen=True, eq=False)
class SoftPrefix:
    """``k`` trained embeddings, float32, in the units of the model's embedding module.

    ``losses`` are those of the steps' own batches, ``before`` and ``after`` of all examples, in nats a token.
    """

    embeddings: Float[Tensor, "k d_model"]
    losses: tuple[float, ...]
    before: float
    after: float

    def __len__(self) -> int:
        return len(self.embeddings)

    def identity(self) -> str:
        """Hex SHA-256 of the embeddings."""
        return sha256_of(self.embeddings.contiguous().numpy().tobytes())

    def save(self, folder: str | Path) -> None:
        """Write ``soft_prefix.safetensors`` and, with its hash, ``soft_prefix.json``."""
        raw = save({"embeddings": self.embeddings.contiguous()})
        atomic_write(Path(folder) / "soft_prefix.safetensors", raw)
        facts: dict[str, Any] = {"losses": self.losses, "before": self.before, "after": self.after}
        write_json(Path(folder) / "soft_prefix.json", facts | {"sha256": sha256_of(raw)})

    @classmethod
    def load(cls, folder: str | Path) -> SoftPrefix:
        """Read a saved one; a missing, torn or foreign file is a :class:`UserError`."""
        folder = Path(folder)
        facts = read_json(folder / "soft_prefix.json")
        try:
            raw = (folder / "soft_prefix.safetensors").read_bytes()
            whole = facts["sha256"] == sha256_of(raw)
            found = cls(load(raw)["embeddings"], tuple(facts["losses"]), facts["before"], facts["after"])
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}/soft_prefix: cannot be read ({error}); train it again") from error
        if not whole:
            raise UserError(f"{folder}/soft_prefix: its two files do not belong together; train it again")
        return found


def train_soft_prefix(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    k: int = 8,
    steps: int = 150,
    lr: float = RATE,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: Callable[[float], None] | None = None,
) -> SoftPrefix:
    """Train ``k`` embeddings by Adam, with a rate that falls linearly to nothing; the same for a seed.

    They begin as those of random tokens. Each batch holds as many harmful examples as others. The prompts are read
    once, where the model's layers allow it: they stand before the prefix, which cannot change them.

    Args:
        lr: in units of the root mean square of the first embeddings, so that one rate suits all models.
        progress: called with the loss of every step.

    Raises:
        UserError: a model that takes no embeddings, examples of one side alone, a loss that is not finite.
    """
    if k < 1 or steps < 1:
        raise UserError(f"soft prefix: {k} embeddings and {steps} steps; give at least 1 of each")
    sides(examples)  # before anything is read
    check_embedded(model)
    prompts = PromptCache(model, KEPT)
    rng = torch.Generator().manual_seed(seed)
    start = _random_tokens(model, k, rng)
    scale = float(start.square().mean().sqrt())
    tuned = (start / scale).requires_grad_()
    adam = torch.optim.Adam([tuned], lr=lr)
    batches = _batches(examples, batch_size, rng)
    before, losses = mean_loss(model, examples, start, prompts), []
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = answer_losses(model, next(batches), tuned * scale, prompts).mean()
        if not torch.isfinite(loss):
            raise UserError(f"soft prefix: the loss is {loss.item()} at step {step + 1}; lower the learning rate")
        (tuned.grad,) = torch.autograd.grad(loss, tuned)  # the weights' gradients are never computed
        adam.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(losses[-1])
    found = (tuned * scale).detach()
    after = mean_loss(model, examples, found, prompts)
    return SoftPrefix(found.cpu(), tuple(losses), before, after)


def _random_tokens(model: HookedModel, k: int, rng: torch.Generator) -> Float[Tensor, "k d_model"]:
    """Embeddings of random tokens, float32: a beginning of the size that the model is used to."""
    known = min(model.n_embeddings, len(model.tokenizer))
    ids = torch.randint(known, (k,), generator=rng)
    return token_embeddings(model, ids).detach().float()


def _batches(examples: Sequence[Example], size: int, rng: torch.Generator) -> Iterator[list[Example]]:
    """Half of every batch from each side, each side in a new random order whenever it has been gone through."""
    queues: list[list[Example]] = [[], []]
    while True:
        batch = []
        for queue, side in zip(queues, sides(examples), strict=True):
            for _ in range(max(1, size // 2)):
                if not queue:
                    queue += [side[int(i)] for i in torch.randperm(len(side), generator=rng)]
                batch.append(queue.pop())
        yield batch
