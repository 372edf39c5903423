"""Keys and values of prompts that were read before: arms that differ only at the end of a prompt share the rest.

Steering at the final token and an injected prefix leave all earlier tokens as they were, so an arm needs to read
only what is its own. The numbers are those of a full pass, up to the rounding of another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import collate, token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.interp.recent import Recent

BYTES = 512 * 2**20
SPEECH = ("prefix", "response")

# Per layer the keys and the values of one prompt, stacked: (2, head, token, head_dim).
Layers = list[Float[Tensor, "2 head _ dim"]]


class PromptCache:
    """Keys and values of the latest prompts of one model, within ``max_bytes`` on the model's device.

    Serves models whose layers all attend to everything and keep plain keys and values; for others, for edits inside
    the shared part, and for prompts that would not fit, :meth:`past` gives None and the whole prompt is read.
    """

    def __init__(self, model: HookedModel, max_bytes: int = BYTES) -> None:
        self.model = model
        self._kept: Recent[Layers] = Recent(max_bytes)
        self._of: str = ""  # weights and configuration that what is kept belongs to
        self._plain: bool | None = None  # whether the model's layers are of the kind served; known after a pass

    def past(self, rows: Sequence[Rendered], edits: Sequence[Edit] = ()) -> Any:
        """A cache of the shared beginning of ``rows``: all but as many last columns as the most changed row needs.

        The batch it belongs to is padded on the left. Every call gives a cache of its own, free to grow.
        """
        if self._plain is False or self.model.backend != "hf" or not self.model.pads:
            return None
        if any(e.reads_prompt or e.when is not None for e in edits):  # what a gate reads must not be skipped
            return None
        fixed = [_fixed(row, edits) for row in rows]
        own = max(len(row) - n for row, n in zip(rows, fixed, strict=True))
        if any(len(row) <= own for row in rows) or not self._fits(rows):
            return None
        if self._of != self.model.fingerprint:
            self._kept, self._of = Recent(self._kept.bound), self.model.fingerprint
        missing = {row.ids[:n]: row for row, n in zip(rows, fixed, strict=True) if self._kept.get(row.ids[:n]) is None}
        self._read(list(missing))
        if self._plain is False:
            return None
        found = [self._kept.get(row.ids[:n]) for row, n in zip(rows, fixed, strict=True)]
        if any(one is None for one in found):
            return None
        return self._assembled([layers for layers in found if layers], [len(row) - own for row in rows])

    def _fits(self, rows: Sequence[Rendered]) -> bool:
        # A set of prompts that does not fit as a whole would push itself out before it is asked for again.
        one = 2 * sum(layer.kv_width for layer in self.model.heads) * self.model.hf.dtype.itemsize
        return one * sum(map(len, rows)) <= self._kept.bound

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """One forward pass of every prompt that is not kept."""
        from transformers.cache_utils import DynamicLayer

        rows = [Rendered("", "", ids, ("template",) * len(ids)) for ids in prompts]
        for order in token_budget_batches([len(row) for row in rows], self.model.token_budget):
            batch = collate([rows[i] for i in order], self.model.pad_id, "right").to(self.model.device)
            with torch.no_grad(), self.model.evaluating():
                read = self.model.base(**self.model.inputs(batch) | {"use_cache": True})
            cache = getattr(read, "past_key_values", None)
            layers = getattr(cache, "layers", None) or []
            self._plain = len(layers) == self.model.n_layers and all(type(one) is DynamicLayer for one in layers)
            if not self._plain:
                return
            for place, i in enumerate(order):
                n = len(rows[i])
                held = [torch.stack((one.keys[place, :, :n], one.values[place, :, :n])) for one in layers]
                self._kept.put(rows[i].ids, held, sum(x.nbytes for x in held))

    def _assembled(self, found: Sequence[Layers], lengths: Sequence[int]) -> Any:
        """Prompts cut to ``lengths``, padded on the left, as a cache."""
        from transformers import DynamicCache

        width = max(lengths)
        cache = DynamicCache()
        for layer in range(self.model.n_layers):
            like = found[0][layer]
            block = like.new_zeros((2, len(found), like.shape[1], width, like.shape[3]))
            for place, (layers, n) in enumerate(zip(found, lengths, strict=True)):
                block[:, place, :, width - n :] = layers[layer][:, :, :n]
            cache.update(block[0], block[1], layer)
        return cache


def _fixed(row: Rendered, edits: Sequence[Edit]) -> int:
    """How many first tokens no arm changes: all before the last header token, and before the first edited one."""
    end = next((i for i, role in enumerate(row.roles) if role in SPEECH), len(row)) - 1
    return min([end, *(next((i for i, hit in enumerate(e.where.mask(row)) if hit), end) for e in edits)])
