"""What the steps of the tracking study share: models, arms, prompts, and how results become JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.files import sha256_of
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.store.activations import ActivationStore
from pingscope.interp.store.extraction import extract, extraction_code
from pingscope.probes.statistics import Estimate

if TYPE_CHECKING:
    from pingscope.steering.injection import Arm


@dataclass(frozen=True)
class Tracking:
    """What every step below shares."""

    models: Mapping[str, HookedModel]
    arms: Sequence[Arm]
    chat: Sequence[Record]
    tasks: Sequence[Record]
    out: Path
    layers: list[int]
    C: float
    seed: int

    @property
    def origin(self) -> HookedModel:
        """The reference arm's model: its probes do the reading."""
        return self.models[self.arms[0].model]

    def chat_rows(self, model: HookedModel) -> list[Rendered]:
        return [model.render(record.prompt()) for record in self.chat]

    def rows(self, arm: Arm) -> list[Rendered]:
        return [self.models[arm.model].render(arm.apply(task.prompt())) for task in self.tasks]

    def chat_store(self, name: str) -> ActivationStore:
        return self.store(f"chat-{name}", self.models[name], self.chat_rows(self.models[name]))

    def store(self, name: str, model: HookedModel, rows: Sequence[Rendered]) -> ActivationStore:
        # Named by content: a changed model or prompt gets a store of its own, an unchanged one is found again.
        content = sha256_of(
            [model.fingerprint, extraction_code(), self.layers, [[row.id, row.label, row.ids] for row in rows]]
        )
        return extract(model, rows, self.out / "activations" / f"{name}-{content[:8]}", layers=self.layers)


def layer_key(layer: int) -> str:
    """A layer's name in results: ``embed`` before block 0, else its number."""
    return "embed" if layer < 0 else str(layer)


def group_ids(records: Sequence[Record]) -> list[str] | None:
    """What may not be split: ``pair_id``, else the record itself; ``None`` when nothing is shared."""
    groups = [record.pair_id or record.id for record in records]
    return groups if len(set(groups)) < len(groups) else None


def plain(value: Any) -> Any:
    """Nested results as JSON values: estimates as dicts, NaN as ``None``."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
