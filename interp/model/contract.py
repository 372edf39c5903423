"""What the parts of this room ask of a model, so that none of them needs to know the class that puts them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pingscope.interp.chat.rendering import Rendered
    from pingscope.interp.model.families import Family, Heads


@runtime_checkable
class Model(Protocol):
    """The part of :class:`pingscope.interp.model.hooked.HookedModel` that hooks, checks and components use."""

    hf: Any
    name: str
    family: Family
    base: nn.Module
    blocks: list[nn.Module]
    parts: list[dict[str, nn.Module] | None]
    n_layers: int
    d_model: int
    heads: tuple[Heads, ...]
    n_heads: int
    vocab_size: int
    pad_id: int
    takes_positions: bool
    n_streams: int
    stream_axis: int | None

    @property
    def device(self) -> torch.device: ...
    @property
    def final_norm(self) -> nn.Module | None: ...
    def part(self, layer: int, name: str) -> nn.Module: ...
    def beside(self, x: Tensor) -> Tensor: ...
    def on_residual(self, layer: int, function: Callable[[Tensor], Tensor | None]) -> Any: ...
    def evaluating(self) -> AbstractContextManager[None]: ...


@runtime_checkable
class Past(Protocol):
    """Keeps keys and values of prompts; :class:`pingscope.interp.generate.prompt_cache.PromptCache` is one."""

    def past(self, rows: Sequence[Rendered], edits: Sequence[Any] = ()) -> Any: ...
