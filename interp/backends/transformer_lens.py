"""TransformerLens' ``TransformerBridge`` behind the contract, and its ``ActivationCache`` to and from a store.

The bridge's hook points are where the stream is read and edited, never compatibility mode: that one centres the
stream of LayerNorm models (measured: 5-10 % away from the checkpoint's own).
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import Batch, token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit, Handle, Sink, capture, check_residual, edit, live_edits
from pingscope.interp.model.selection import EMBED, Selection, final
from pingscope.interp.store.activations import ActivationStore
from pingscope.interp.store.extraction import extract


@dataclass(frozen=True)
class PointHandle:
    """A hook on a hook point; removing it leaves the point's other hooks alone."""

    point: Any
    handle: Any

    def remove(self) -> None:
        self.handle.hook.remove()
        self.point.fwd_hooks[:] = [other for other in self.point.fwd_hooks if other is not self.handle]


class BridgeModel(HookedModel):
    """A ``TransformerBridge`` (``bridge``) with the methods of :class:`HookedModel`. Its attention runs eagerly.

    Raises:
        UserError: a bridge in compatibility mode, one without decoder blocks, one without a tokenizer.
    """

    backend = "transformer_lens"

    def __init__(
        self,
        bridge: Any,
        tokenizer: Any = None,
        name: str | None = None,
        *,
        blocks: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if getattr(bridge, "compatibility_mode", False):
            raise UserError(
                "this bridge is in compatibility mode, which changes the residual stream; boot it anew without "
                "enable_compatibility_mode()"
            )
        if not hasattr(bridge, "blocks"):
            raise UserError("this bridge has no decoder blocks; use a decoder-only language model")
        tokenizer = tokenizer or bridge.tokenizer
        if tokenizer is None:
            raise UserError("this bridge has no tokenizer; set bridge.tokenizer first")
        self.bridge = bridge
        self._checkpoint = fingerprint
        super().__init__(bridge.original_model, tokenizer, name or bridge.cfg.model_name, blocks=blocks)

    @property
    def fingerprint(self) -> str:
        """The checkpoint's, taken before its weights were renamed; of the bridge's own if it came ready-made."""
        return self._checkpoint or super().fingerprint

    def on_residual(self, layer: int, function: Callable[[Tensor], Tensor | None]) -> Handle:
        point = self.bridge.blocks[0].hook_in if layer == EMBED else self.bridge.blocks[layer].hook_out
        return PointHandle(point, point.add_hook(lambda x, hook: function(check_residual(layer, x))))

    def read(self, batch: Batch, layers: Sequence[int], sink: Sink, edits: Sequence[Edit] = ()) -> None:
        live = live_edits([e for e in edits if e.layer <= max(layers)], batch.rows)
        given = self.inputs(batch)
        with self.evaluating(), edit(self, batch.rows, live), capture(self, layers, sink):
            self.bridge(given.pop("input_ids"), return_type=None, **given)


def boot(model: HookedModel) -> BridgeModel:
    """A bridge around a loaded model, which it rewrites: attention switched to eager, modules replaced in place.

    Raises:
        UserError: an architecture TransformerLens has no adapter for.
    """
    from transformer_lens.model_bridge import TransformerBridge

    hf, fingerprint = model.hf, model.fingerprint
    # The architecture is looked up by name; a model that was never saved has none in its configuration.
    hf.config.architectures = hf.config.architectures or [type(hf).__name__]
    tokenizer = copying.deepcopy(model.tokenizer)
    # The bridge would load the tokenizer again from where it came from, to prepend BOS; ids come rendered here.
    tokenizer.init_kwargs |= {"name_or_path": model.name, "add_bos_token": True}
    try:
        with _nothing_installed():
            bridge = TransformerBridge.boot_transformers(
                model.name, hf_model=hf, tokenizer=tokenizer, device=str(model.device), dtype=hf.dtype
            )
    except (ValueError, NotImplementedError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{model.name}: TransformerLens cannot bridge {type(hf).__name__} ({reason})") from error
    return BridgeModel(bridge, model.tokenizer, model.name, blocks=model.family.blocks, fingerprint=fingerprint)


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """For a vision model's image processor TransformerLens runs ``pip install torchvision`` where that is missing.

    It brings another torch and replaces the one that is running. Text needs no image processor.
    """
    from transformer_lens.model_bridge.sources.transformers import helpers

    found = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = found


def head_writes(
    model: BridgeModel, rows: Sequence[Rendered], layer: int, where: Selection | None = None
) -> list[Float[Tensor, "token head d_model"]]:
    """What every head of a layer writes at the tokens ``where`` (default: the final one), row by row, float64.

    TransformerLens' way: ``hook_z`` through ``W_O``, without the projection's bias, before a post-norm where there is
    one. :func:`interp.causal.attribution.attribute` cuts the projection of the plain model instead; both give the same.
    """
    where = final() if where is None else where
    attention = model.bridge.blocks[layer].attn
    weight = attention.W_O.detach().double()
    model.check_context(rows)
    found: list[Tensor] = [weight.new_empty(0)] * len(rows)
    for order in token_budget_batches([len(row) for row in rows], model.token_budget):
        batch = model.batch([rows[i] for i in order])
        kept: list[Tensor] = []
        point = attention.hook_z
        handle = PointHandle(point, point.add_hook(lambda z, hook, kept=kept: kept.append(z.detach())))
        try:
            given = model.inputs(batch)
            with torch.no_grad(), model.evaluating():
                model.bridge(given.pop("input_ids"), return_type=None, **given)
        finally:
            handle.remove()
        z = kept[0].double().reshape(*batch.ids.shape, weight.shape[0], weight.shape[1])
        for j, i in enumerate(order):
            mask = torch.tensor(where.mask(rows[i]), device=z.device)
            found[i] = torch.einsum("ths,hsd->thd", z[j, : len(mask)][mask], weight)
    return found


def to_activation_cache(store: ActivationStore, prompt_ids: Sequence[str] | None = None, model: Any = None) -> Any:
    """A TransformerLens ``ActivationCache`` of a store's residuals, for its analysis functions.

    Args:
        prompt_ids: rows of the cache, in this order (default: all of the store, which are then all in memory).
        model: a bridge, for those of the cache's methods that need one.

    Shape (prompt, kept position, d_model), padded with zeros on the right. Layer l is ``blocks.l.hook_resid_post``,
    the stream before block 0 ``blocks.0.hook_resid_pre``.
    """
    from transformer_lens import ActivationCache

    spans = [store.rows(name) for name in (store.prompt_ids if prompt_ids is None else prompt_ids)]
    if not spans:
        raise UserError(f"{store.path}: no prompts asked for; give at least one id")
    width = max(span.stop - span.start for span in spans)
    cache = {}
    for layer in store.layers:
        rows = store.layer(layer)
        padded = torch.zeros((len(spans), width, rows.shape[1]), dtype=rows.dtype)
        for i, span in enumerate(spans):
            padded[i, : span.stop - span.start] = rows[span]
        cache[hook_name(layer)] = padded
    return ActivationCache(cache, model)


def from_activation_cache(
    cache: Any,
    model: HookedModel,
    rows: Sequence[Rendered],
    out_dir: str | Path,
    *,
    side: Literal["left", "right"] = "right",
    where: Selection | None = None,
    dtype: str = "float32",
    token_budget: int | None = None,
) -> ActivationStore:
    """Write the residuals of an ``ActivationCache`` to a store.

    Args:
        model: the checkpoint that the cache is of, for the store's identity; it is not run.
        rows: the prompts behind the cache's rows, in its order; ``side`` is where they were padded.
        where: positions to keep (default: all of the prompt).

    Raises:
        UserError: a cache without residuals, or of another shape than ``rows`` and ``model`` have.
    """
    names = {layer: _names(layer) & set(cache.keys()) for layer in range(EMBED, model.n_layers)}
    streams = {layer: cache[min(found)] for layer, found in names.items() if found}
    if not streams:
        raise UserError(f"the cache has no residuals ({hook_name(0)}, …); cache hook_resid_post")
    wanted = (len(rows), max(map(len, rows)), model.d_model)
    for layer, x in streams.items():
        if tuple(x.shape) != wanted:
            raise UserError(f"the cache's {hook_name(layer)} has shape {tuple(x.shape)}, the prompts have {wanted}")
    replay = CachedModel(streams, model, rows, side)
    return extract(replay, rows, out_dir, layers=[*streams], where=where, dtype=dtype, token_budget=token_budget)


def hook_name(layer: int) -> str:
    """TransformerLens' name of the stream after ``layer``."""
    return "blocks.0.hook_resid_pre" if layer == EMBED else f"blocks.{layer}.hook_resid_post"


def _names(layer: int) -> set[str]:
    """Both names that a bridge's caches have for it."""
    return {hook_name(layer), "blocks.0.hook_in" if layer == EMBED else f"blocks.{layer}.hook_out"}


class CachedModel(HookedModel):
    """A model whose forward passes were made before: :meth:`read` answers from an ``ActivationCache``."""

    backend = "transformer_lens cache"

    def __init__(self, streams: dict[int, Tensor], model: HookedModel, rows: Sequence[Rendered], side: str) -> None:
        self.__dict__.update(model.__dict__)
        self.streams, self.side, self.source = streams, side, model
        self.numbers = {row.id: (i, len(row)) for i, row in enumerate(rows)}

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def read(self, batch: Batch, layers: Sequence[int], sink: Sink, edits: Sequence[Edit] = ()) -> None:
        if edits:
            raise UserError("a cache holds what was computed; edits need the model itself")
        for layer in sorted(layers):
            cached = self.streams[layer]
            x = torch.zeros((*batch.ids.shape, self.d_model), dtype=cached.dtype, device=cached.device)
            for j, row in enumerate(batch.rows):
                number, length = self.numbers[row.id]
                first = cached.shape[1] - length if self.side == "left" else 0
                x[j, : len(row)] = cached[number, first : first + len(row)]
            sink(layer, x)
