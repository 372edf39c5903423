"""How far answers behind a prefix are from those wanted: the one loss of both bounds of the prefix search.

Harmful tasks should begin like a refusal, the others like the agent's own answers. The loss is the cross-entropy of the
first tokens of each, in nats a token; both sides weigh the same, however many examples each has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.embedded import embedded_inputs, with_placeholders
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel

BATCH = 16
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A prompt, rendered up to where the model speaks, and how its answer should begin."""

    row: Rendered
    target: tuple[int, ...]


def sides(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Harmful tasks and the others.

    Raises:
        UserError: one side is empty, or an example has no target.
    """
    if any(not one.target for one in examples):
        raise UserError("bounds: an example has no answer to train towards; leave it out")
    harmful = [one for one in examples if one.row.label == "harmful"]
    others = [one for one in examples if one.row.label != "harmful"]
    if not harmful or not others:
        raise UserError("bounds: needs harmful tasks and benign ones that the agent answers; add validation tasks")
    return harmful, others


def answer_losses(
    model: HookedModel,
    examples: Sequence[Example],
    embeddings: Float[Tensor, "k d_model"],
    prompts: PromptCache | None = None,
) -> Float[Tensor, " example"]:
    """Mean negative log-likelihood of each example's target behind ``embeddings``, in nats a token, float32.

    Differentiable in ``embeddings`` alone. ``prompts`` keeps what was read of the prompts, which no prefix changes.
    """
    k, longest = len(embeddings), max(len(one.target) for one in examples)
    rows = [_whole(with_placeholders(one.row, k, model.pad_id), one.target) for one in examples]
    model.check_context(rows)
    batch = model.batch(rows, side="left")
    with model.evaluating():
        given = embedded_inputs(model, batch, embeddings)
        past = prompts.past(rows) if prompts is not None else None
        if past is not None:
            known = past.get_seq_length()
            given |= {name: given[name][:, known:] for name in ("inputs_embeds", "position_ids") if name in given}
            given |= {"past_key_values": past, "use_cache": True}
        last = {"logits_to_keep": longest + 1} if model.head_takes_last else {}
        logits = model.hf(**given, **last).logits[:, -longest - 1 : -1].float()
    labels = torch.full(logits.shape[:2], IGNORED, device=logits.device)
    for i, one in enumerate(examples):
        labels[i, longest - len(one.target) :] = torch.tensor(one.target, device=logits.device)
    nats = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(labels.shape).sum(-1) / (labels != IGNORED).sum(-1)


def mean_loss(
    model: HookedModel,
    examples: Sequence[Example],
    embeddings: Float[Tensor, "k d_model"],
    prompts: PromptCache | None = None,
) -> float:
    """The loss on all examples: the mean of the two sides' means."""
    with torch.no_grad():
        return balanced(examples, [float(x) for x in _in_batches(model, examples, embeddings, prompts)])


def balanced(examples: Sequence[Example], losses: Sequence[float]) -> float:
    """The mean of the two sides' means."""
    means = []
    for harmful in (True, False):
        mine = [x for one, x in zip(examples, losses, strict=True) if (one.row.label == "harmful") is harmful]
        means.append(sum(mine) / len(mine))
    return sum(means) / 2


def loss_gradient(
    model: HookedModel,
    examples: Sequence[Example],
    embeddings: Float[Tensor, "k d_model"],
    prompts: PromptCache | None = None,
) -> Float[Tensor, "k d_model"]:
    """Gradient of :func:`mean_loss`; weights get none, and only one batch's graph is held at a time."""
    sizes = {harmful: sum((e.row.label == "harmful") is harmful for e in examples) for harmful in (True, False)}
    total = torch.zeros_like(embeddings)
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        leaf = embeddings.detach().requires_grad_()
        losses = answer_losses(model, batch, leaf, prompts)
        weights = torch.tensor([0.5 / sizes[e.row.label == "harmful"] for e in batch], device=losses.device)
        total += torch.autograd.grad((losses * weights).sum(), leaf)[0]
    return total


def _in_batches(
    model: HookedModel, examples: Sequence[Example], embeddings: Tensor, prompts: PromptCache | None
) -> list[Tensor]:
    out: list[Tensor] = []
    for start in range(0, len(examples), BATCH):
        out += answer_losses(model, examples[start : start + BATCH], embeddings, prompts)
    return out


def _whole(row: Rendered, target: tuple[int, ...]) -> Rendered:
    return replace(row, ids=row.ids + target, roles=row.roles + ("response",) * len(target))
