"""The readings of a collapse, side by side, at three positions of a prompt.

A probe trained on prompt averages and read at single tokens is off its training distribution there, so the
sign of its logit may be a property of the *position*. Therefore, per arm and layer:

``raw``        mean logit (the paper's reading);
``contrast``   harmful minus benign at the same position, its AUROC, and how much the gap shrank against base;
``shift``      arm minus base at the same position on the same prompts;
``placed``     probes trained *at* that position: is the signal still linearly there (own probes), and does
               what the base's probes read carry over (transfer)? Cross-validated by group;
``realigned``  the base's probe after a label-free map onto the base's activations, :mod:`pingscope.probes.realigned`.

Positions: ``prompt``, ``instruction`` and ``final``, see :mod:`pingscope.probes.pooling`. A gap is harmful minus
*benign*; look-alike prompts have their own entries in ``raw`` and ``shift``, and stand in for benign ones
where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pingscope.interp.errors import UserError
from pingscope.probes.controls import FOLDS, SHUFFLES, CrossFit, average, cross_fit, permute_within
from pingscope.probes.logistic import C_DEFAULT, LayerProbes, folds, score_sweep
from pingscope.probes.pooling import Pooled
from pingscope.probes.realigned import realign
from pingscope.probes.resampling import NO_INTERVAL, Groups, bootstrap, codes
from pingscope.probes.statistics import Estimate, auroc, difference, gap, mean, paired_difference, tpr_at_fpr

POSITIONS = {"prompt": "mean_prompt", "instruction": "mean_instruction", "final": "final"}

Positions = Mapping[str, Pooled]  # position -> pooled activations of one arm
Readings = dict[str, Any]  # nested as in the module's docstring, leaves are Estimates


@dataclass(frozen=True)
class Reference:
    """What every arm is compared with: the bare base on the same prompts, and its chat-trained probes."""

    pooled: Positions
    probes: LayerProbes
    groups: Groups = None
    C: float = C_DEFAULT
    seed: int = 0

    @cached_property
    def labels(self) -> np.ndarray:
        return np.array(self.pooled["final"].labels)

    @cached_property
    def harmful(self) -> np.ndarray:
        return self.labels == "harmful"

    @cached_property
    def contrasted(self) -> np.ndarray:
        """Mask of the prompts a gap is taken over."""
        benign = self.labels == "benign"
        return self.harmful | (benign if benign.any() else self.labels == "lookalike")

    @cached_property
    def clusters(self) -> np.ndarray | None:
        return None if self.groups is None else codes(self.groups)

    @cached_property
    def placed(self) -> dict[tuple[str, int], CrossFit]:
        """The base's probes trained at a position, per (position, layer); over the contrasted prompts."""
        return {
            (position, layer): cross_fit(x[rows], self.harmful[rows], self.splits(rows), self.C)
            for position in POSITIONS
            for layer, x in self.pooled[position].features.items()
            if (rows := self.contrasted & self.pooled[position].present).any()
        }

    @cached_property
    def shuffled(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Permutations of the contrasted prompts' labels (permutation, prompt), and the folds they share."""
        rng, splits = np.random.default_rng(self.seed), self.splits(self.contrasted)
        mixed = [permute_within(self.harmful[self.contrasted], splits, rng) for _ in range(SHUFFLES)]
        return np.stack(mixed), splits

    def splits(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return folds(self.harmful[rows], self.within(rows), FOLDS, self.seed)

    def within(self, rows: np.ndarray) -> np.ndarray | None:
        return None if self.clusters is None else self.clusters[rows]

    def aligned(self, arm: Positions) -> dict[str, Pooled]:
        """An arm's activations in the reference's order of prompts; every prompt must be there."""
        wanted = self.pooled["final"].prompt_ids
        result = {}
        for position in POSITIONS:
            at = {prompt: i for i, prompt in enumerate(arm[position].prompt_ids)}
            lost = [prompt for prompt in wanted if prompt not in at]
            if lost:
                raise UserError(f"collapse: prompt {lost[0]!r} is missing in an arm; run every arm on the same prompts")
            result[position] = arm[position].take(np.array([at[prompt] for prompt in wanted]))
        return result


def readings(reference: Reference, arm: Positions, layer: int) -> Readings:
    """The five readings of one arm at one layer; leaves are Estimates with intervals over prompts."""
    here = reference.aligned(arm)
    result: Readings = {name: {} for name in ("raw", "contrast", "shift", "placed", "realigned")}
    for position in POSITIONS:
        z = reference.probes.logits(here[position].features[layer], layer)
        z_base = reference.probes.logits(reference.pooled[position].features[layer], layer)
        result["raw"][position] = {}
        result["shift"][position] = {}
        for label in sorted(set(reference.labels)):
            own = reference.labels == label
            groups, seed = reference.within(own), reference.seed
            result["raw"][position][label] = mean(z[own], groups=groups, seed=seed)
            result["shift"][position][label] = paired_difference(z[own], z_base[own], groups=groups, seed=seed)
        result["contrast"][position] = _contrast(reference, z, z_base)
        result["placed"][position] = _placed(reference, here[position], position, layer)
        result["realigned"][position] = _realigned(reference, here[position], position, layer)
    return result


def gap_shrink(
    z: np.ndarray,
    z_base: np.ndarray,
    harmful: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Estimate:
    """1 - gap / base's gap over the same prompts: 0 = unchanged, 1 = gone, negative = grew.

    Arms and base are resampled together. NaN where the base has no gap to lose (it is not positive).
    """
    here = ~(np.isnan(z) | np.isnan(z_base))
    z, z_base, harmful, missing = z[here], z_base[here], harmful[here], int((~here).sum())
    if not harmful.any() or harmful.all():
        return Estimate(np.nan, NO_INTERVAL, len(z), missing)

    def shrink(weights: np.ndarray) -> np.ndarray:
        before = gap(weights, z_base, harmful)
        ratio = np.full(len(before), np.nan)
        np.divide(gap(weights, z, harmful), before, out=ratio, where=before > 0)
        return 1 - ratio

    value = float(shrink(np.ones((1, len(z))))[0])
    if np.isnan(value):
        return Estimate(value, NO_INTERVAL, len(z), missing)
    taken = None if groups is None else groups[here]
    return Estimate(value, bootstrap(shrink, len(z), groups=taken, strata=harmful, seed=seed), len(z), missing)


def gap_restored(
    reference: Reference, agent: Positions, arm: Positions, layer: int, position: str = "final"
) -> Estimate:
    """How much of the gap that the agent lost an intervention brings back, at one position over the same prompts.

    (gap of the arm - gap of the agent) / (gap of the base - gap of the agent): 0 = nothing, 1 = all of it, negative =
    it takes more away. The paper's claim about a prefix (section 5) as a number. All three are resampled together; NaN
    where the agent lost no gap.
    """
    rows, layers = reference.contrasted, (reference.pooled, reference.aligned(agent), reference.aligned(arm))
    base, plain, changed = (reference.probes.logits(one[position].features[layer][rows], layer) for one in layers)
    here = ~(np.isnan(base) | np.isnan(plain) | np.isnan(changed))
    harmful, groups = reference.harmful[rows][here], reference.within(rows)
    lost, back = (base - plain)[here], (changed - plain)[here]
    missing = int((~here).sum())
    if not harmful.any() or harmful.all():
        return Estimate(np.nan, NO_INTERVAL, len(lost), missing)

    def share(weights: np.ndarray) -> np.ndarray:
        whole = gap(weights, lost, harmful)
        found = np.full(len(whole), np.nan)
        np.divide(gap(weights, back, harmful), whole, out=found, where=whole > 0)
        return found

    value = float(share(np.ones((1, len(lost))))[0])
    if np.isnan(value):
        return Estimate(value, NO_INTERVAL, len(lost), missing)
    taken = None if groups is None else groups[here]
    interval = bootstrap(share, len(lost), groups=taken, strata=harmful, seed=reference.seed)
    return Estimate(value, interval, len(lost), missing)


def label_controls(
    reference: Reference, arm: Positions, shuffled: Sequence[LayerProbes], layer: int
) -> dict[str, Estimate]:
    """What shuffled labels would show at the final token: the row printed beside every verdict.

    ``auroc``: chat probes trained on shuffled labels, read on the true ones; ``placed_auroc``: probes trained
    and read on shuffled labels there. Value and interval are means over repetitions.
    """
    here = reference.aligned(arm)["final"]
    rows, seed = reference.contrasted, reference.seed  # every prompt has a final token
    x, harmful, groups = here.features[layer][rows], reference.harmful[rows], reference.within(rows)
    labels, splits = reference.shuffled
    scores = score_sweep(x, labels, splits, (reference.C,))[0]
    placed = [auroc(own, mixed, groups, seed=seed) for own, mixed in zip(scores, labels, strict=True)]
    read = [auroc(probe.logits(x, layer), harmful, groups, seed=seed) for probe in shuffled]
    return {"auroc": average(read), "placed_auroc": average(placed)}


def _contrast(reference: Reference, z: np.ndarray, z_base: np.ndarray) -> dict[str, Estimate]:
    rows, seed = reference.contrasted, reference.seed
    harmful, groups = reference.harmful[rows], reference.within(rows)
    pair = None if groups is None else (groups[harmful], groups[~harmful])
    return {
        "gap": difference(z[rows][harmful], z[rows][~harmful], groups=pair, seed=seed),
        "auroc": auroc(z[rows], harmful, groups, seed=seed),
        "gap_shrink": gap_shrink(z[rows], z_base[rows], harmful, groups=groups, seed=seed),
    }


def placed_scores(
    reference: Reference, arm: Pooled, position: str, layer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, own, transferred): out-of-fold logits of the arm's own probes and of the base's there."""
    rows = reference.contrasted & reference.pooled[position].present
    x, there = arm.features[layer][rows], arm.present[rows]
    base = reference.placed.get((position, layer))
    if base is None:
        return rows, np.full(len(x), np.nan), np.full(len(x), np.nan)
    splits = [(train[there[train]], test) for train, test in base.splits]
    own = cross_fit(x, reference.harmful[rows], splits, reference.C)
    return rows, own.scores(x), base.scores(x)


def _placed(reference: Reference, arm: Pooled, position: str, layer: int) -> dict[str, Estimate]:
    rows, own, transferred = placed_scores(reference, arm, position, layer)
    harmful, groups, seed = reference.harmful[rows], reference.within(rows), reference.seed
    return {
        "auroc": auroc(own, harmful, groups, seed=seed),
        "tpr_at_1fpr": tpr_at_fpr(own, harmful, 0.01, groups, seed=seed),
        "transfer_auroc": auroc(transferred, harmful, groups, seed=seed),
    }


def realigned_logits(
    reference: Reference, arm: Pooled, position: str, layer: int
) -> tuple[np.ndarray, str | None, float]:
    """Base-probe logits of the mapped activations, the family of the map, and its held-out R squared."""
    base = reference.pooled[position]
    here = base.present & arm.present
    z = np.full(len(here), np.nan)
    found = realign(
        arm.features[layer][here],
        base.features[layer][here],
        groups=reference.within(here),
        seed=reference.seed,
    )
    if found is None:
        return z, None, float("nan")
    z[here] = reference.probes.logits(found.features, layer)
    return z, found.family, found.explained


def _realigned(reference: Reference, arm: Pooled, position: str, layer: int) -> Readings:
    z, family, explained = realigned_logits(reference, arm, position, layer)
    z_base = reference.probes.logits(reference.pooled[position].features[layer], layer)
    return {**_contrast(reference, z, z_base), "map": family, "explained": explained}
