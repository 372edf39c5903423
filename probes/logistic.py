"""Per-layer logistic probes, read in raw residual space: logit = w . x + b, positive = harmful.

Fitted with scikit-learn on standardised features (statistics of the training rows only) and mapped back: the
scaler's mean goes into the intercept and its scale into the direction, so a probe can be read at any token,
added to the residual as a steering direction, or compared with another model's, without carrying a scaler.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import sklearn
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write, read_json, sha256_of
from pingscope.interp.model.belonging import check_belongs
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.gram import sweep
from pingscope.probes.resampling import Groups, codes

C_DEFAULT = 0.1
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)

_ITERATIONS = 2000
_NARROW = 256
_FORMAT = 1

States = TypeVar("States", np.ndarray, torch.Tensor)


class ProbeConvergenceWarning(UserWarning):
    """A fit stopped before its optimum; the probe's ``meta`` says which layer."""


@dataclass(frozen=True)
class LayerProbes:
    """One direction and intercept a layer, in raw residual space."""

    layers: tuple[int, ...]
    directions: Float[np.ndarray, "layer d_model"]
    intercepts: Float[np.ndarray, " layer"]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.layers)
        if self.directions.ndim != 2 or self.directions.shape[0] != n or self.intercepts.shape != (n,):
            raise UserError(
                f"probes: {n} layers, but directions {self.directions.shape} and intercepts {self.intercepts.shape}; "
                "fit them again"
            )
        for layer, w, b in zip(self.layers, self.directions, self.intercepts, strict=True):
            if not (np.isfinite(w).all() and np.isfinite(b)):
                raise UserError(f"probes: layer {layer} is not finite; fit them again, with another C")

    @classmethod
    def fit(
        cls,
        features: Mapping[int, np.ndarray],
        labels: Sequence[Any] | np.ndarray,
        *,
        groups: Groups = None,
        C: float | Literal["cv"] = C_DEFAULT,
        seed: int = 0,
        meta: Mapping[str, Any] | None = None,
    ) -> LayerProbes:
        """Fit one probe a layer on ``features[layer]`` (n, d_model).

        ``C`` is scikit-learn's inverse regularisation on standardised features; ``"cv"`` picks it from
        :data:`C_GRID` by held-out log loss over folds that keep ``groups`` together.

        Raises:
            UserError: one class only, features and labels of different lengths, values that are not finite.
        """
        positive = is_harmful(labels)
        layers = tuple(sorted(features))
        chosen, converged, directions, intercepts = {}, {}, [], []
        for layer in layers:
            x = checked(features[layer], positive, layer)
            chosen[str(layer)] = choose_c(x, positive, groups, seed) if C == "cv" else float(C)
            w, b, done = fit_direction(x, positive, chosen[str(layer)])
            if not done:
                warnings.warn(f"probe of layer {layer} did not converge", ProbeConvergenceWarning, stacklevel=2)
            converged[str(layer)] = done
            directions.append(w)
            intercepts.append(b)
        facts = {
            "n": len(positive),
            "n_harmful": int(positive.sum()),
            "C": chosen,
            "converged": converged,
            "sklearn": sklearn.__version__,
        }
        return cls(layers, np.stack(directions), np.array(intercepts), {**facts, **(meta or {})})

    def logits(self, x: States, layer: int) -> States:
        """Safety logits of activations (..., d_model) at ``layer``: (...), the same kind as ``x``, float64.

        Raises:
            UserError: no probe for that layer, or activations of another width.
        """
        if layer not in self.layers:
            raise UserError(f"probe: no layer {layer}; this probe has {list(self.layers)}")
        i = self.layers.index(layer)
        w, b = self.directions[i], float(self.intercepts[i])
        if x.shape[-1] != len(w):
            raise UserError(f"probe: activations are {x.shape[-1]} wide, the probe {len(w)}; use its own model")
        if isinstance(x, torch.Tensor):
            # The intercept cancels most of w . x, so float64; Apple's GPU has float32 at most.
            dtype = torch.float32 if x.device.type == "mps" else torch.float64
            return x.to(dtype) @ torch.as_tensor(w, dtype=dtype, device=x.device) + b
        return np.asarray(x.astype(np.float64) @ w + b)  # 0-d for a single vector

    def check_model(self, model: HookedModel, *, transfer: bool = False, path: str | Path = "") -> dict[str, Any]:
        """Refuse a model that these probes cannot be read on, or were not fitted on without ``transfer`` being asked.

        Returns:
            Where the probes are from and read on, see :func:`pingscope.interp.model.belonging.check_belongs`.
        """
        width, deepest = self.directions.shape[1], max(self.layers)
        if width != model.d_model or deepest >= model.n_layers:
            raise UserError(
                f"{path or 'probes'}: probes of width {width}, layers up to {deepest}, but {model.name} has d_model "
                f"{model.d_model} and {model.n_layers} layers; fit probes on this model's own store (pingscope cache, "
                "pingscope probe)"
            )
        return check_belongs(self.meta, model, transfer, "probes", path)

    def save(self, folder: str | Path) -> None:
        """Write ``probes.safetensors``, then ``probes.json`` with its hash: load notices a torn pair."""
        folder = Path(folder)
        raw = save_arrays({"directions": self.directions, "intercepts": self.intercepts})
        atomic_write(folder / "probes.safetensors", raw)
        facts = {"format": _FORMAT, "layers": list(self.layers), "sha256": sha256_of(raw), "meta": self.meta}
        atomic_write(folder / "probes.json", json.dumps(facts, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> LayerProbes:
        """Read a saved probe; a missing, torn or foreign file is a :class:`UserError`."""
        folder = Path(folder)
        facts = _record(folder / "probes.json")
        try:
            raw = (folder / "probes.safetensors").read_bytes()
            arrays = load_arrays(raw)
            directions, intercepts = arrays["directions"], arrays["intercepts"]
        except OSError as error:
            raise UserError(f"{folder}/probes.safetensors: no such file; fit the probes again") from error
        except (KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}/probes.safetensors: not saved probes ({error}); fit them again") from error
        layers = tuple(facts["layers"])
        if sha256_of(raw) != facts["sha256"] or len(layers) != len(directions):
            raise UserError(f"{folder}: probes.safetensors and probes.json do not belong together; fit again")
        if directions.dtype != np.float64 or intercepts.dtype != np.float64:
            raise UserError(f"{folder}/probes.safetensors: {directions.dtype}, not float64; fit the probes again")
        try:
            return cls(layers, directions, intercepts, facts["meta"])
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error


_FIELDS: dict[str, type] = {"format": int, "layers": list, "sha256": str, "meta": dict}


def _record(path: Path) -> dict[str, Any]:
    """The record beside the arrays, every field of it as :meth:`LayerProbes.save` writes it."""
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise UserError(f"{path}: not the record of saved probes; fit the probes again")
    for name in sorted(set(facts) ^ set(_FIELDS)):
        state = "unknown" if name in facts else "missing"
        raise UserError(f"{path}: field {name} is {state}; fit the probes again")
    for name, kind in _FIELDS.items():
        if type(facts[name]) is not kind:
            raise UserError(f"{path}: field {name} is {facts[name]!r:.40}, not {kind.__name__}; fit the probes again")
    if facts["format"] != _FORMAT:
        raise UserError(f"{path}: format {facts['format']}, not {_FORMAT}; fit the probes again")
    layers = facts["layers"]
    if not layers or any(type(layer) is not int or layer < -1 for layer in layers) or len(set(layers)) < len(layers):
        raise UserError(f"{path}: field layers is {layers!r:.40}, not distinct layer numbers; fit the probes again")
    return facts


def is_harmful(labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Boolean labels from harmful / benign / lookalike (a look-alike is benign) or from 0 / 1."""
    known = {"harmful": True, "benign": False, "lookalike": False, 0: False, 1: True}
    try:
        return np.array([known[label.item() if hasattr(label, "item") else label] for label in labels], bool)
    except KeyError as error:
        raise UserError(f"probe: label {error} is not harmful, benign, lookalike, 0 or 1") from error


def checked(x: np.ndarray, positive: np.ndarray, layer: int) -> np.ndarray:
    """Training features as float64, or a :class:`UserError` that says what is wrong with them."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) != len(positive):
        raise UserError(f"probe: layer {layer} has features {x.shape} for {len(positive)} labels")
    if not np.isfinite(x).all():
        raise UserError(f"probe: features of layer {layer} are not finite; drop prompts without such tokens")
    if positive.all() or not positive.any():
        raise UserError("probe: training needs harmful and benign prompts; one of the two is missing")
    return x


def fit_direction(x: np.ndarray, positive: np.ndarray, C: float) -> tuple[np.ndarray, float, bool]:
    """Direction and intercept in raw space, and whether the fit converged; constant features weigh 0."""
    scaler = StandardScaler().fit(x)
    # Narrow features: a Newton step costs less than the dozens of gradient steps it replaces.
    solver = "newton-cholesky" if x.shape[1] <= _NARROW else "lbfgs"
    model = LogisticRegression(C=C, solver=solver, max_iter=_ITERATIONS, tol=1e-6)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(scaler.transform(x), positive)
    w = model.coef_[0] / scaler.scale_
    w[scaler.var_ == 0] = 0.0
    done = not any(issubclass(item.category, ConvergenceWarning) for item in raised)
    return w, float(model.intercept_[0] - w @ scaler.mean_), done


def choose_c(x: np.ndarray, positive: np.ndarray, groups: Groups, seed: int) -> float:
    """The C of :data:`C_GRID` with the least held-out log loss; the smallest wins a tie."""
    split = folds(positive, groups, 5, seed)
    if not split:
        return C_DEFAULT

    scores = score_sweep(x, positive[None], split, C_GRID)[:, 0]
    read = ~np.isnan(scores[0])
    chance = 1 / (1 + np.exp(-np.clip(scores[:, read], -500, 500)))
    losses = [log_loss(positive[read], p, labels=[False, True]) for p in chance]
    return C_GRID[int(np.argmin(losses))]


def score_sweep(
    x: np.ndarray, labels: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]], Cs: Sequence[float]
) -> np.ndarray:
    """Out-of-fold logits (C, labelling, prompt) of every fit: in Gram space where prompts are fewer than coordinates.

    ``labels`` (labelling, prompt) are boolean; a fold that has one class only under a labelling stays NaN there.
    """
    if x.shape[1] > max((len(train) for train, _ in splits), default=0):
        return sweep(x, labels, splits, Cs)
    scores = np.full((len(Cs), *labels.shape), np.nan)
    for train, test in splits:
        for i, own in enumerate(labels):
            if own[train].all() or not own[train].any():
                continue
            for c, C in enumerate(Cs):
                w, b, _ = fit_direction(x[train], own[train], C)
                scores[c, i, test] = x[test] @ w + b
    return scores


def folds(positive: np.ndarray, groups: Groups, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most ``k`` (train, test) splits that keep groups whole, both classes in every training part.

    Empty when the data cannot be split so: fewer than two groups in a class.
    """
    own = np.arange(len(positive)) if groups is None else codes(groups)
    k = min(k, len(set(own[positive])), len(set(own[~positive])))
    if k < 2:
        return []
    # Without groups the plain splitter gives the same guarantee and is a hundred times faster.
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(k, shuffle=True, random_state=seed)
    splits = splitter.split(np.zeros(len(positive)), positive, None if groups is None else own)
    return [(train, test) for train, test in splits if 0 < positive[train].sum() < len(train) and len(test)]
