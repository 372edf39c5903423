"""Rendering prompts, reading and editing a model's residual stream, keeping activations.

Names load on first use: ``import pingscope.interp`` itself needs neither torch nor transformers. The two functions
named like their files are imported from there: ``from pingscope.interp.generate.generation import generate`` and
``from pingscope.interp.store.extraction import extract``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingscope.interp.chat.batching import Batch, collate, token_budget_batches
    from pingscope.interp.chat.rendering import ROLES, Prompt, Rendered, render
    from pingscope.interp.errors import UserError
    from pingscope.interp.generate.generation import Generation, first_token_distribution
    from pingscope.interp.loading import load_model
    from pingscope.interp.model.hooked import HookedModel
    from pingscope.interp.model.hooks import Edit, capture, edit
    from pingscope.interp.model.selection import Selection, parse, resolve_layers
    from pingscope.interp.store.activations import ActivationStore
    from pingscope.interp.store.extraction import estimate

_HOME = {
    "Batch": "chat.batching",
    "collate": "chat.batching",
    "token_budget_batches": "chat.batching",
    "ROLES": "chat.rendering",
    "Prompt": "chat.rendering",
    "Rendered": "chat.rendering",
    "render": "chat.rendering",
    "UserError": "errors",
    "estimate": "store.extraction",
    "Generation": "generate.generation",
    "first_token_distribution": "generate.generation",
    "Edit": "model.hooks",
    "capture": "model.hooks",
    "edit": "model.hooks",
    "HookedModel": "model.hooked",
    "load_model": "loading",
    "Selection": "model.selection",
    "parse": "model.selection",
    "resolve_layers": "model.selection",
    "ActivationStore": "store.activations",
}

__all__ = [
    "ROLES",
    "ActivationStore",
    "Batch",
    "Edit",
    "Generation",
    "HookedModel",
    "Prompt",
    "Rendered",
    "Selection",
    "UserError",
    "capture",
    "collate",
    "edit",
    "estimate",
    "first_token_distribution",
    "load_model",
    "parse",
    "render",
    "resolve_layers",
    "token_budget_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pingscope.interp' has no attribute {name!r}")
    return getattr(import_module(f"pingscope.interp.{_HOME[name]}"), name)
