"""Pingscope: see where an LLM agent's refusal goes under fine-tuning, and what brings it back.

Rooms: :mod:`pingscope.interp` renders, hooks and stores; :mod:`pingscope.probes` reads; :mod:`pingscope.steering`
changes; :mod:`pingscope.experiments` runs studies; :mod:`pingscope.figures` draws. The names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingscope.experiments.agents.judges import judge
    from pingscope.interp.chat.rendering import Prompt, render
    from pingscope.interp.errors import UserError
    from pingscope.interp.loading import load_model
    from pingscope.interp.model.hooked import HookedModel
    from pingscope.interp.store.activations import ActivationStore
    from pingscope.probes.logistic import LayerProbes
    from pingscope.steering.directions import Direction

_HOME = {
    "ActivationStore": "interp.store.activations",
    "Direction": "steering.directions",
    "HookedModel": "interp.model.hooked",
    "LayerProbes": "probes.logistic",
    "Prompt": "interp.chat.rendering",
    "UserError": "interp.errors",
    "judge": "experiments.agents.judges",
    "load_model": "interp.loading",
    "render": "interp.chat.rendering",
}

__all__ = [
    "ActivationStore",
    "Direction",
    "HookedModel",
    "LayerProbes",
    "Prompt",
    "UserError",
    "judge",
    "load_model",
    "render",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pingscope' has no attribute {name!r}")
    return getattr(import_module(f"pingscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
