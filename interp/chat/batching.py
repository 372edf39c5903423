"""Padded batches, and how to cut prompts into batches of about equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rendered prompts as one padded block. ``position_ids`` count from 0 at each row's first real token."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    rows: tuple[Rendered, ...]
    side: str

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.position_ids.to(device), self.rows, self.side)


def collate(rows: Sequence[Rendered], pad_id: int, side: Literal["left", "right"] = "left") -> Batch:
    """Pad ``rows`` to their longest on one side."""
    if not rows:
        raise UserError("collate: no prompts; give at least one")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row.ids, dtype=torch.long)
        mask[i, columns] = 1
    return Batch(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), tuple(rows), side)


def token_budget_batches(
    lengths: Sequence[int], token_budget: int, max_rows: int | None = None, *, padded: bool = True
) -> list[list[int]]:
    """Indices cut into batches of at most ``token_budget`` slots (rows x longest), longest prompts first.

    Sorting by length keeps padding small; the longest batch comes first so that a lack of memory shows at
    once. The result depends on the lengths and the budget alone. A prompt longer than the budget goes alone. Not
    ``padded``, a batch holds one length.
    """
    if token_budget < 1:
        raise UserError(f"token budget {token_budget} is not positive; give at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        batch = batches[-1] if batches else []
        room = token_budget // max(lengths[batch[0]] if batch else lengths[i], 1)
        fits = padded or not batch or lengths[i] == lengths[batch[0]]
        if batch and fits and len(batch) < min(room, max_rows or room):
            batch.append(i)
        else:
            batches.append([i])
    return batches
