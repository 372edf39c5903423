"""Directions, operators, injection arms and the PING prefix search.

The function named like its file is imported from there: ``from pingscope.steering.ping import ping``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingscope.steering.directions import Direction
    from pingscope.steering.injection import Arm
    from pingscope.steering.phrases import PhraseGenerator

__all__ = ["Arm", "Direction", "PhraseGenerator"]

_HOME = {
    "Arm": "pingscope.steering.injection",
    "Direction": "pingscope.steering.directions",
    "PhraseGenerator": "pingscope.steering.phrases",
}


def __getattr__(name: str) -> Any:
    # Lazy: the phrase grammar and the command line must not wait for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pingscope.steering' has no attribute {name!r}")
