"""TransformerLens' ``TransformerBridge`` behind the contract, and its ``ActivationCache`` to and from a store.

The bridge's hook points are where the stream is read and edited, never compatibility mode: that one centres the
stream of LayerNorm models (measured: 5-10 % away from the checkpoint's own).
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interp.batching import Batch
from interp.errors import UserError
from interp.hooks import Edit, Handle, Sink, capture, check_residual, edit, matches
from interp.model import HookedModel
from interp.selection import EMBED


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
        live = [e for e in edits if e.layer <= max(layers) and matches(e.where, batch.rows)]
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
        bridge = TransformerBridge.boot_transformers(
            model.name, hf_model=hf, tokenizer=tokenizer, device=str(model.device), dtype=hf.dtype
        )
    except (ValueError, NotImplementedError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{model.name}: TransformerLens cannot bridge {type(hf).__name__} ({reason})") from error
    return BridgeModel(bridge, model.tokenizer, model.name, blocks=model.family.blocks, fingerprint=fingerprint)
