"""Rendering prompts, reading and editing a model's residual stream, keeping activations.

Names load on first use: ``import interp`` itself needs neither torch nor transformers. The two functions
named like their files are imported from there: ``from interp.generate import generate`` and
``from interp.extract import extract``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.batching import Batch, collate, token_budget_batches
    from interp.chat import ROLES, Prompt, Rendered, render
    from interp.errors import UserError
    from interp.extract import estimate
    from interp.generate import Generation, first_token_distribution
    from interp.hooks import Edit, capture, edit
    from interp.model import HookedModel, load_model
    from interp.selection import Selection, parse, resolve_layers
    from interp.store import ActivationStore

_HOME = {
    "Batch": "batching",
    "collate": "batching",
    "token_budget_batches": "batching",
    "ROLES": "chat",
    "Prompt": "chat",
    "Rendered": "chat",
    "render": "chat",
    "UserError": "errors",
    "estimate": "extract",
    "Generation": "generate",
    "first_token_distribution": "generate",
    "Edit": "hooks",
    "capture": "hooks",
    "edit": "hooks",
    "HookedModel": "model",
    "load_model": "model",
    "Selection": "selection",
    "parse": "selection",
    "resolve_layers": "selection",
    "ActivationStore": "store",
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
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    return getattr(import_module(f"interp.{_HOME[name]}"), name)
