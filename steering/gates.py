"""Gates: a probe that decides, row by row and within the forward pass, whether an intervention acts.

A gate reads the residual stream at one layer and selection of tokens, scores each row, and is open where the score
lies above its threshold. The threshold comes from benign prompts at a stated false-positive rate. Every row is closed
before its evidence is complete; no row's decision depends on another's. With generated tokens in the selection it
decides again at each of them (streaming). CAST's rule (Lee et al., METHODS of conditional activation steering) stands
beside the probe's as a comparison.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import Selection, parse
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.statistics import rate

FPR = 0.01
_FORMAT = 1


def logit_score(x: Float[Tensor, "row d_model"], w: Float[Tensor, " d_model"], b: float) -> Float[Tensor, " row"]:
    """The safety logit w·x + b."""
    # A product and a sum, not a matrix product: a row's bits must not depend on how many rows there are.
    return (x * w).sum(-1) + b


def cast_score(x: Float[Tensor, "row d_model"], c: Float[Tensor, " d_model"], b: float) -> Float[Tensor, " row"]:
    """CAST's condition: cos(x, tanh(P x)) with P the projection onto ``c``; ``b`` is added and usually 0."""
    projected = torch.tanh((x * c).sum(-1, keepdim=True) / (c * c).sum() * c)
    lengths = x.norm(dim=-1) * projected.norm(dim=-1)
    return (x * projected).sum(-1) / lengths.clamp(min=torch.finfo(x.dtype).tiny) + b


Rule = Literal["logit", "cast"]
RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"logit": logit_score, "cast": cast_score}


@dataclass(frozen=True)
class OperatingPoint:
    """How a threshold was set. ``method`` is ``order statistic`` or ``F1``.

    ``fpr`` is the stated rate: that a new benign prompt, exchangeable with the ``n`` of the calibration, scores above
    the threshold is at most so likely. ``observed`` of those ``n`` lie above it, ``ci`` is Wilson's 95% interval.
    """

    fpr: float | None
    n: int
    observed: int
    ci: tuple[float, float]
    method: str = "order statistic"


@dataclass(frozen=True, eq=False)
class Gate:
    """Where a probe is read, and when it opens.

    Args:
        layer: output of this block is read (-1: the stream before block 0), before any edit of the same layer.
        where: tokens read. Prompt tokens are one piece of evidence, decided on when the last of them is there; every
            generated token among them decides again.
        direction, intercept: of the probe, in raw residual space.
        threshold: open above it, strictly. Infinite until :func:`calibrate` sets it: nothing opens.
        pooling: what is scored: the ``mean`` over the tokens read so far, or the ``last`` of them.
        release: an open gate closes at or below this score (hysteresis, over tokens and over the steps of an
            episode); ``None``: at the threshold. Minus infinity: once open it stays open.
        sign: -1 where low scores are harmful (CAST's comparator).
        probe: SHA-256 of what the direction was taken from; model: fingerprint of the model it reads.
    """

    layer: int
    where: Selection
    direction: Float[np.ndarray, " d_model"]
    intercept: float = 0.0
    threshold: float = math.inf
    pooling: Literal["last", "mean"] = "last"
    release: float | None = None
    rule: Rule = "logit"
    sign: int = 1
    point: OperatingPoint | None = None
    probe: str = ""
    model: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not np.isfinite(self.direction).all() or not self.direction.any():
            raise UserError("gate: its direction is not a finite vector other than zero; use another probe or layer")
        if self.release is not None and self.release > self.threshold:
            raise UserError(
                f"gate: release {self.release:g} lies above the threshold {self.threshold:g}; hysteresis needs it below"
            )

    def score(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Float64 scores of pooled states; each row's bits depend on that row alone."""
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        w = torch.as_tensor(self.direction, dtype=dtype, device=x.device)
        return self.sign * RULES[self.rule](x.to(dtype), w, self.intercept)

    def decide(self, scores: Float[Tensor, " row"], was_open: Bool[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Open above the threshold; what was open stays so above the release."""
        if not torch.isfinite(scores).all():
            raise UserError("gate: a score is not finite; the model's activations overflow, load it in float32")
        release = self.threshold if self.release is None else self.release
        return (scores > self.threshold) | (was_open & (scores > release))

    def watch(self, rows: Sequence[Rendered]) -> GateWatch:
        """A watch that remembers nothing from earlier steps and logs nothing; see :class:`GateSession`."""
        return GateWatch(self, rows)

    def identity(self) -> list[Any]:
        """What decides the gate's decisions, as data to hash."""
        release = None if self.release is None else self.release.hex()
        numbers = [float(self.intercept).hex(), float(self.threshold).hex(), release, self.sign]
        vector = sha256_of(np.ascontiguousarray(self.direction, np.float64).tobytes())
        return [self.layer, str(self.where), self.pooling, self.rule, vector, *numbers]

    @property
    def hash(self) -> str:
        """Short SHA-256 of :meth:`identity`."""
        return sha256_of(self.identity())[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, exact: numbers as hexadecimal floats, the direction as base64 of float64."""
        exact = {name: float(getattr(self, name)).hex() for name in ("intercept", "threshold")}
        raw = np.ascontiguousarray(self.direction, "<f8").tobytes()
        return {
            "format": _FORMAT,
            "layer": self.layer,
            "where": str(self.where),
            "pooling": self.pooling,
            "rule": self.rule,
            "sign": self.sign,
            **exact,
            "release": None if self.release is None else float(self.release).hex(),
            "direction": base64.b64encode(raw).decode(),
            "point": None if self.point is None else asdict(self.point),
            "probe": self.probe,
            "model": self.model,
            "meta": self.meta,
            "identity": self.hash,
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any], source: str = "gate") -> Gate:
        """The gate of :meth:`to_dict`.

        Raises:
            UserError: a field is missing or malformed, or the numbers are not those of the identity beside them.
        """
        try:
            point = row["point"] and OperatingPoint(**(row["point"] | {"ci": tuple(row["point"]["ci"])}))
            gate = cls(
                row["layer"],
                parse(row["where"]),
                np.frombuffer(base64.b64decode(row["direction"]), "<f8").astype(np.float64),
                float.fromhex(row["intercept"]),
                float.fromhex(row["threshold"]),
                row["pooling"],
                None if row["release"] is None else float.fromhex(row["release"]),
                row["rule"],
                row["sign"],
                point,
                row["probe"],
                row["model"],
                row["meta"],
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise UserError(f"{source}: not a saved gate ({error}); calibrate it again") from error
        if row.get("format") != _FORMAT or row.get("identity") != gate.hash:
            raise UserError(f"{source}: the gate's numbers do not match its identity; calibrate it again")
        return gate

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read a saved gate; a missing or changed file is a :class:`UserError`."""
        return cls.from_dict(read_json(path), str(path))

    def check_model(self, fingerprint: str) -> None:
        """Refuse a model the gate was not calibrated on."""
        if self.model and self.model != fingerprint:
            raise UserError(
                f"gate: calibrated on the model {self.model[:12]}…, this one is {fingerprint[:12]}…; thresholds do not "
                "carry over, calibrate it on this model"
            )


Note = Callable[[str, int, float, bool], None]  # row, position, score, open


class GateWatch:
    """One batch under a gate: evidence, scores and states of every row.

    Tokens already read are not read again, so it does not matter whether keys and values are cached, the prompt
    comes in pieces, or each step runs the whole text.
    """

    def __init__(self, gate: Gate, rows: Sequence[Rendered], was_open: Sequence[bool] = (), note: Note | None = None):
        self.gate, self.rows, self.note = gate, rows, note
        masks = [gate.where.mask(row)[: row.n_prompt] for row in rows]
        self._wanted = torch.tensor([sum(mask) for mask in masks])
        self._count = torch.zeros(len(rows), dtype=torch.long)
        self._upto = torch.full((len(rows),), -1)
        self._total: Tensor | None = None
        self._state = torch.tensor([*was_open] or [False] * len(rows))
        self._decided = torch.zeros(len(rows), dtype=torch.bool)
        self._early = torch.zeros(len(rows), dtype=torch.bool)  # asked about before there was evidence
        # As of every position: an edit of a token depends on what was known there, also when it runs again.
        self._flags = torch.zeros((len(rows), max(map(len, rows)) + 1), dtype=torch.bool)

    def see(self, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"], states: Tensor) -> None:
        """Take in what one pass shows; decide for the rows whose evidence is complete."""
        rows, positions = rows.cpu(), positions.cpu()
        fresh = positions > self._upto[rows]
        if not fresh.any():
            return
        rows, positions, states = rows[fresh], positions[fresh], states[fresh.to(states.device)]
        here, counts = torch.unique_consecutive(rows, return_counts=True)
        ends = counts.cumsum(0) - 1
        pooled = self._pool(here, counts, states, ends)
        self._count[here] += counts
        self._upto[here] = positions[ends]
        complete = self._count[here] >= self._wanted[here]
        if not complete.any():
            return
        deciding, at = here[complete], positions[ends][complete]
        scores = self.gate.score(pooled[complete.to(pooled.device)]).double().cpu()
        opened = self.gate.decide(scores, self._state[deciding])
        if (opened & self._early[deciding]).any():
            raise UserError(
                f"gate: a token to be edited passed before the gate had read '{self.gate.where}'; edit 'final' or "
                "generated tokens, or read prompts in one piece"
            )
        self._state[deciding] = opened
        self._mark(deciding, at, opened)
        if self.note is not None:
            for row, position, score, flag in zip(*(x.tolist() for x in (deciding, at, scores, opened)), strict=True):
                self.note(self.rows[row].id, position, score, flag)

    def open(self, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"]) -> Bool[Tensor, " token"]:
        """State as of each token: of the last decision up to it, or of the prompt's for tokens before that one."""
        rows, positions = rows.cpu(), positions.cpu().clamp(max=self._flags.shape[1] - 1)
        self._early[rows] |= ~self._decided[rows]
        return self._flags[rows, positions]

    @property
    def opened(self) -> Bool[Tensor, " row"]:
        """The rows whose latest decision was to open; rows without one are closed."""
        return self._state & self._decided

    def _pool(self, here: Tensor, counts: Tensor, states: Tensor, ends: Tensor) -> Tensor:
        if self.gate.pooling == "last":
            return states[ends.to(states.device)]
        # Summed row by row: the bits of a sum depend on its order, and other rows must not change it.
        dtype = torch.float32 if states.device.type == "mps" else torch.float64
        sums = torch.stack([part.to(dtype).sum(0) for part in states.split(counts.tolist())])
        if self._total is None:
            self._total = torch.zeros((len(self.rows), states.shape[-1]), dtype=dtype, device=states.device)
        index = here.to(states.device)
        self._total[index] += sums
        return self._total[index] / (self._count[here] + counts).to(self._total)[:, None]

    def _mark(self, rows: Tensor, at: Tensor, flags: Tensor) -> None:
        width, needed = self._flags.shape[1], int(at.max()) + 2
        if needed > width:
            last = self._flags[:, -1:]
            self._flags = torch.cat([self._flags, last.expand(-1, max(width, needed - width))], 1)
        since = torch.where(self._decided[rows], at, torch.zeros_like(at))
        later = torch.arange(self._flags.shape[1]) >= since[:, None]
        self._flags[rows] = torch.where(later, flags[:, None], self._flags[rows])
        self._decided[rows] = True


def calibrate(gate: Gate, scores: Sequence[float] | np.ndarray, fpr: float = FPR) -> Gate:
    """Set the threshold so that at most ``fpr`` of new benign prompts open the gate.

    Of n scores the k-th largest is the threshold, with k = floor(fpr (n + 1)): a new score, exchangeable with
    these, lies above it with probability k / (n + 1) at most (the bound of conformal prediction), and at most k - 1
    of the n do.

    Args:
        scores: of benign and look-alike prompts that trained nothing; one a prompt, or the largest one an episode.

    Raises:
        UserError: fewer than 1 / fpr - 1 scores, for which no threshold states that rate, or scores not finite.
    """
    if not 0 < fpr < 1:
        raise UserError(f"calibrate: a false-positive rate of {fpr:g} is not between 0 and 1")
    values = np.sort(np.asarray(scores, np.float64))[::-1]
    if not np.isfinite(values).all():
        raise UserError("calibrate: a score is not finite; drop that prompt or load the model in float32")
    k = math.floor(fpr * (len(values) + 1) + 1e-9)
    if k < 1:
        raise UserError(
            f"calibrate: {len(values)} benign scores cannot state a false-positive rate of {fpr:g}; give at least "
            f"{math.ceil(1 / fpr - 1 - 1e-9)}, or state a larger rate"
        )
    threshold = float(values[k - 1])
    return replace(gate, threshold=threshold, point=_point(values > threshold, fpr, "order statistic"))


def calibrate_f1(gate: Gate, harmful: Sequence[float] | np.ndarray, benign: Sequence[float] | np.ndarray) -> Gate:
    """The threshold and sign with the best F1, as CAST calibrates; it states no false-positive rate.

    ``harmful`` and ``benign`` are scores of the gate as it is.
    """
    up, down = np.asarray(harmful, np.float64), np.asarray(benign, np.float64)
    if not len(up) or not len(down):
        raise UserError("calibrate: F1 needs harmful and benign scores; one of the two is missing")
    best = (-1.0, 0.0, 1)
    for sign in (1, -1):
        cuts = np.unique(sign * np.concatenate([up, down]))
        for cut in np.concatenate([cuts[:1] - 1, (cuts[1:] + cuts[:-1]) / 2]):
            hits, false = (sign * up > cut).sum(), (sign * down > cut).sum()
            f1 = 2 * hits / (hits + false + len(up))
            best = max(best, (float(f1), float(cut), sign), key=lambda one: one[0])
    f1, cut, sign = best
    point = _point(sign * down > cut, None, "F1")
    return replace(gate, threshold=cut, sign=gate.sign * sign, point=point, meta=gate.meta | {"f1": f1})


def _point(above: np.ndarray, fpr: float | None, method: str) -> OperatingPoint:
    found = rate(above.tolist())
    return OperatingPoint(fpr, len(above), int(above.sum()), found.ci, method)


def from_probe(probes: LayerProbes, layer: int, where: Selection, pooling: Literal["last", "mean"], model: str) -> Gate:
    """A gate on a fitted probe, closed until it is calibrated.

    Args:
        where, pooling: what the probe is read on; best what it was fitted on.
        model: fingerprint of the model to be read.
    """
    if layer not in probes.layers:
        raise UserError(f"gate: no probe for layer {layer}; this probe has {list(probes.layers)}")
    i = probes.layers.index(layer)
    raw = np.ascontiguousarray(probes.directions[i], np.float64)
    probe = sha256_of(raw.tobytes() + np.float64(probes.intercepts[i]).tobytes())
    return Gate(layer, where, raw, float(probes.intercepts[i]), pooling=pooling, probe=probe, model=model)


def cast_direction(
    harmful: Float[np.ndarray, "n d_model"], benign: Float[np.ndarray, "m d_model"]
) -> Float[np.ndarray, " d_model"]:
    """CAST's direction (``pca_pairwise``): first principal component of pairs centred on their midpoints.

    Rows are paired in order; the sign points from benign to harmful.
    """
    n = min(len(harmful), len(benign))
    if not n:
        raise UserError("cast: needs harmful and benign prompts; one of the two is missing")
    half = (np.asarray(harmful[:n], np.float64) - np.asarray(benign[:n], np.float64)) / 2
    # Each pair centred on its midpoint is (half, -half): their first component is that of the halves, uncentred.
    component = np.linalg.svd(half, full_matrices=False)[2][0]
    return component if half.mean(0) @ component >= 0 else -component


def gated(edits: Sequence[Edit], gate: Any) -> tuple[Edit, ...]:
    """The same edits, each applied only where ``gate`` (a :class:`Gate` or a session) is open."""
    return tuple(replace(edit, when=gate) for edit in edits)
