"""Which kind of token a response begins with: the decision the paper reads at the final token (its section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.beginnings import token_classes, where_answers_differ
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.statistics import mean
from pingscope.steering.injection import Arm


def first_token_mass(
    model: HookedModel,
    records: Sequence[Record],
    arm: Arm,
    examples: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """``[label][refusal | action | comment | other]``: mean probability of the first generated token's class.

    Behind the white space that a template begins every answer with (GLM-4's line end), where it does.

    Args:
        examples: beginnings of ``refusals``, ``actions`` and ``comments`` in the model's own action language;
            default: common ones.
    """
    if arm.gate is not None and arm.prefix:
        raise UserError(f"first tokens: arm {arm.name!r} puts its prefix in after the prompt; give the prefix ungated")
    classes = token_classes(model.tokenizer, **(examples or {}))
    mass: dict[str, dict[str, dict[str, Any]]] = {}
    for label in dict.fromkeys(record.label for record in records):
        rows = _that_fit(model, arm, [record for record in records if record.label == label])
        if not rows:
            continue
        probability = model.next_token_logits(where_answers_differ(model, rows), arm.live_edits()).softmax(-1)
        by_class = {name: probability[:, list(ids)].sum(-1) for name, ids in classes.items()}
        by_class["other"] = 1 - torch.stack(list(by_class.values())).sum(0)
        mass[label] = {name: mean(values.double().numpy(), seed=seed).to_dict() for name, values in by_class.items()}
    return mass


def _that_fit(model: HookedModel, arm: Arm, records: Sequence[Record]) -> list[Rendered]:
    """Rendered prompts; one beyond the context, or that cannot be rendered, is left out, as its episode is."""
    rows = []
    for record in records:
        with suppress(UserError):
            row = model.render(arm.apply(record.prompt()))
            model.check_context([row])
            rows.append(row)
    return rows
