"""Pooling, per-layer logistic probes, tracks over positions, collapse readings, and statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pingscope.probes.logistic import LayerProbes
    from pingscope.probes.statistics import Estimate

__all__ = ["Estimate", "LayerProbes"]

_HOME = {"Estimate": "pingscope.probes.statistics", "LayerProbes": "pingscope.probes.logistic"}


def __getattr__(name: str) -> Any:
    # Lazy: figures and judges need the statistics without waiting for scikit-learn and torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pingscope.probes' has no attribute {name!r}")
