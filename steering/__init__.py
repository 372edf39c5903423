"""Directions, operators, injection arms and the PING prefix search.

The function named like its file is imported from there: ``from steering.ping import ping``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.directions import Direction
    from steering.injection import Arm
    from steering.phrases import PhraseGenerator

__all__ = ["Arm", "Direction", "PhraseGenerator"]

_HOME = {
    "Arm": "steering.injection",
    "Direction": "steering.directions",
    "PhraseGenerator": "steering.phrases",
}


def __getattr__(name: str) -> Any:
    # Lazy: the phrase grammar and the command line must not wait for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'steering' has no attribute {name!r}")
