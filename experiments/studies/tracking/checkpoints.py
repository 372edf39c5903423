"""The five readings along a fine-tuning run: every checkpoint against the base, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pingscope.experiments.studies.tracking.noise_floor import pooled_in_memory
from pingscope.experiments.studies.tracking.prompts import group_ids, layer_key, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.collapse import POSITIONS, Reference, readings
from pingscope.probes.logistic import LayerProbes

KEPT = ("prompt", "final")


@dataclass(frozen=True)
class Series:
    """The base's side, computed once; :meth:`read` adds one checkpoint."""

    reference: Reference
    tasks: Sequence[Record]

    @classmethod
    def start(cls, base: HookedModel, tasks: Sequence[Record], probes: LayerProbes, *, seed: int = 0) -> Series:
        rows = [base.render(task.prompt()) for task in tasks]
        pooled = pooled_in_memory(base, rows, list(probes.layers), POSITIONS)
        return cls(Reference(pooled, probes, group_ids(tasks), seed=seed), tasks)

    def read(self, model: HookedModel) -> dict[str, Any]:
        """``[layer][reading][position]`` as in ``collapse``, over the prompt and at the final token."""
        layers = list(self.reference.probes.layers)
        rows = [model.render(task.prompt()) for task in self.tasks]
        pooled = pooled_in_memory(model, rows, layers, POSITIONS)
        found = {
            layer_key(layer): {
                name: {position: cell for position, cell in reading.items() if position in KEPT}
                for name, reading in readings(self.reference, pooled, layer).items()
            }
            for layer in layers
        }
        return dict(plain(found))
