"""Directions in the residual stream, one vector per layer, with vector algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_json, sha256_of, write_json
from pingscope.probes.logistic import LayerProbes

Vector = Float[np.ndarray, " d_model"]


@dataclass(frozen=True, eq=False)
class Direction:
    """``vectors[layer]`` has shape (d_model,), float64, in raw residual space. Layer -1 is ``embed``."""

    vectors: dict[int, Vector]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, vector in self.vectors.items():
            if vector.ndim != 1 or not np.isfinite(vector).all():
                raise UserError(f"direction: layer {layer} is not a finite vector; compute it again")

    @property
    def layers(self) -> list[int]:
        return sorted(self.vectors)

    def _each(self, function: Callable[[Vector], Vector]) -> Direction:
        return Direction({layer: function(vector) for layer, vector in self.vectors.items()}, self.meta)

    def _with(self, other: Direction, function: Callable[[Vector, Vector], Vector]) -> Direction:
        if self.layers != other.layers:
            raise UserError(f"directions: layers {self.layers} and {other.layers} differ; select common layers first")
        for layer in self.layers:
            widths = len(self.vectors[layer]), len(other.vectors[layer])
            if widths[0] != widths[1]:
                raise UserError(f"directions: layer {layer} has widths {widths[0]} and {widths[1]}; use one model")
        # What both say stays said: a sum of directions of one model belongs to that model.
        common = {key: value for key, value in self.meta.items() if key in other.meta and other.meta[key] == value}
        vectors = {layer: function(self.vectors[layer], other.vectors[layer]) for layer in self.layers}
        return Direction(vectors, common)

    def __add__(self, other: Direction) -> Direction:
        return self._with(other, np.add)

    def __sub__(self, other: Direction) -> Direction:
        return self._with(other, np.subtract)

    def __mul__(self, factor: float) -> Direction:
        return self._each(lambda vector: vector * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def without(self, other: Direction) -> Direction:
        """The part at right angles to ``other`` on every layer."""
        onto, along = other.unit(), self.dot(other.unit())
        shadow = Direction({layer: along[layer] * vector for layer, vector in onto.vectors.items()}, self.meta)
        return self - shadow

    def unit(self) -> Direction:
        """Length 1 on every layer.

        Raises:
            UserError: a vector of length zero, which points nowhere.
        """
        for layer, norm in self.norms().items():
            if norm == 0:
                raise UserError(f"direction: layer {layer} has length zero; leave that layer out")
        return self._each(lambda vector: vector / np.linalg.norm(vector))

    def norms(self) -> dict[int, float]:
        return {layer: float(np.linalg.norm(vector)) for layer, vector in self.vectors.items()}

    def cosine(self, other: Direction) -> dict[int, float]:
        """Cosine per layer."""
        return self.unit().dot(other.unit())

    def dot(self, other: Direction) -> dict[int, float]:
        """Inner product per layer."""
        products = self._with(other, lambda a, b: np.array([a @ b]))
        return {layer: float(value[0]) for layer, value in products.vectors.items()}

    def select(self, layers: list[int]) -> Direction:
        missing = sorted(set(layers) - set(self.vectors))
        if missing:
            raise UserError(f"direction: no layer {missing[0]}; it has layers {self.layers}")
        return Direction({layer: self.vectors[layer] for layer in layers}, self.meta)

    def save(self, folder: str | Path) -> None:
        """Write ``direction.safetensors``, then ``direction.json`` with its hash: load notices a torn pair."""
        folder = Path(folder)
        raw = save({str(layer): np.ascontiguousarray(vector) for layer, vector in self.vectors.items()})
        atomic_write(folder / "direction.safetensors", raw)
        write_json(folder / "direction.json", {"layers": self.layers, "sha256": sha256_of(raw), "meta": self.meta})

    @classmethod
    def load(cls, folder: str | Path) -> Direction:
        """Read a saved direction; a missing, torn or foreign file is a :class:`UserError`."""
        folder = Path(folder)
        facts = read_json(folder / "direction.json")
        if not isinstance(facts, dict) or not isinstance(facts.get("meta"), dict):
            raise UserError(f"{folder / 'direction.json'}: not the record of a saved direction; save it again")
        try:
            raw = (folder / "direction.safetensors").read_bytes()
            meta, wanted = facts["meta"], facts["sha256"]
            vectors = {int(layer): vector for layer, vector in load(raw).items()}
        except OSError as error:
            raise UserError(
                f"{folder}/direction.safetensors: cannot be read ({error.strerror}); save it again"
            ) from error
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: not a saved direction ({error}); save it again") from error
        if sha256_of(raw) != wanted:
            raise UserError(f"{folder}: the two files of the direction do not belong together; save it again")
        if facts.get("layers") != sorted(vectors) or any(v.dtype != np.float64 for v in vectors.values()):
            raise UserError(f"{folder}: layers or numbers are not those of the record; save the direction again")
        return cls(vectors, meta)


def from_probes(probes: LayerProbes) -> Direction:
    """The probes' raw-space directions: adding them raises the safety logit (towards *harmful*)."""
    vectors = {layer: np.asarray(w, np.float64) for layer, w in zip(probes.layers, probes.directions, strict=True)}
    return Direction(vectors, {"from": "probes", **probes.meta})


def random_like(direction: Direction, seed: int) -> Direction:
    """A random direction of the same length on every layer: the control of every steering result."""
    rng = np.random.default_rng(seed)
    norms = direction.norms()
    drawn = {layer: rng.standard_normal(direction.vectors[layer].shape) for layer in direction.layers}
    vectors = {layer: vector * (norms[layer] / np.linalg.norm(vector)) for layer, vector in drawn.items()}
    return Direction(vectors, {"from": "random", "seed": seed})
