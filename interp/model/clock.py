"""Where every column of a forward pass is in its prompt, read from mask and cache, never guessed from shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.selection import Selection

STATES = ("cache_params", "state")  # what models without keys and values call what they remember

Index = tuple[Tensor, ...]


class Clock:
    """Absolute position of every column of the current forward pass, and which ones a selection means.

    Args:
        base: the module whose forward pass sees ids, mask and cache.
        rows: the prompts of the batch, in its order.
        selections: what the block hooks will ask for.
    """

    def __init__(self, base: nn.Module, rows: Sequence[Rendered], selections: set[Selection]) -> None:
        self.ticks = 0
        self.width = max(map(len, rows))
        self.prompts = {where: _pad([where.mask(row) for row in rows], self.width) for where in selections}
        self.lengths = torch.tensor([[len(row)] for row in rows])
        self.n_prompt = torch.tensor([[row.n_prompt] for row in rows])
        self.shape: tuple[int, int] = (0, 0)
        self.positions: Int[Tensor, "batch pos"] = torch.empty((0, 0), dtype=torch.long)
        self._now: dict[Selection, tuple[Index, int]] = {}
        # Of the class: other libraries wrap the forward pass of an instance and hide its parameters.
        self._signature = inspect.signature(type(base).forward)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model: where is each column?"""
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            raise UserError("an edit needs a forward pass with input_ids or inputs_embeds")
        batch, width = tokens.shape[:2]
        if batch != len(self.lengths):
            raise UserError(
                f"the forward pass has {batch} rows but the edit was made for {len(self.lengths)} prompts; "
                "open a new edit for each batch"
            )
        mask, known = given.get("attention_mask"), _remembered(given)
        past = known or 0
        if known is None and self.ticks and (mask is None or mask.shape[1] > width):
            absolute = self.positions[:, -1:] + 1 + torch.arange(width, device=self.positions.device)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            seen = mask[:, : past + width].long()
            absolute = (seen.cumsum(-1) - 1).masked_fill(seen == 0, -1)[:, -width:]
        elif mask is None:  # no mask, no padding: every column is a token
            absolute = torch.arange(past, past + width).expand(batch, width)
        elif isinstance(given.get("position_ids"), Tensor):  # a mask already made for one attention kernel
            absolute = given["position_ids"].expand(batch, width)
        else:
            raise UserError("an edit needs a forward pass with a 2-D attention_mask or position_ids")
        self.ticks += 1
        self.shape, self.positions, self._now = (batch, width), absolute, {}

    def selected(self, where: Selection) -> tuple[Index, int]:
        """Row and column indices of the columns meant now, and how many of them are prompt tokens."""
        if where not in self._now:
            if self.lengths.device != self.positions.device:
                move = self.positions.device
                self.lengths, self.n_prompt = self.lengths.to(move), self.n_prompt.to(move)
                self.prompts = {key: mask.to(move) for key, mask in self.prompts.items()}
            known = self.positions < self.lengths
            rendered = self.prompts[where].gather(1, self.positions.clamp(0, self.width - 1))
            fresh = where.generated_mask(self.positions - self.n_prompt)
            index = (torch.where(known, rendered, fresh) & (self.positions >= 0)).nonzero(as_tuple=True)
            self._now[where] = index, int(known[index].sum())
        return self._now[where]


def _remembered(given: Mapping[str, Any]) -> int | None:
    """Tokens that a pass has behind it in its cache; None where it continues a state, which has no length: its
    columns follow those of the pass before.
    """
    cache = given.get("past_key_values")
    if any(given.get(name) is not None for name in STATES):
        return None
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError:  # linear attention alone
        return None


def _pad(masks: Sequence[Sequence[bool]], width: int) -> Bool[Tensor, "batch pos"]:
    return torch.tensor([[*mask, *[False] * (width - len(mask))] for mask in masks])
