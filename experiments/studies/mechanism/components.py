"""The smallest set of heads and MLPs whose base activations, patched at the final token alone, bring refusal back.

The search sees validation tasks of all families but one: components are ranked by their first-order effect (one
backward pass). Two searches share a budget of forward passes, and the smaller set wins: the best-ranked components
that reach the target together, then pruned (finds large sets in deep models), and adding one by one by measured effect
(finds small ones). What they found is reported on test tasks of the family they never saw: refusal restored, benign
success lost, and what random sets of the same size restore. The ceiling is what all components together restore: the
head and the embedding stay the agent's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pingscope.experiments.agents.rollout import Episode, MakeEnvironment, run_episodes
from pingscope.experiments.studies.mechanism.decision import log_odds_of, refusal_log_odds, refusal_tokens
from pingscope.experiments.studies.tracking.prompts import group_ids, plain
from pingscope.experiments.tasks.records import Record
from pingscope.interp.causal.patching import (
    Component,
    Donor,
    all_components,
    check_pair,
    estimate_effects,
    patch_components,
)
from pingscope.interp.chat.beginnings import where_answers_differ
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import final
from pingscope.probes.statistics import Estimate, mean, paired_difference, rate, ratio
from pingscope.steering.injection import Arm, steered

BUDGET = 200  # forward passes over the selection prompts
STEPS = 8  # of the greedy search that the budget is to last for; more candidates a step in a small model
TARGET = 0.8  # of the decisions lost
RANDOM_SETS = 20
RANDOM_JUDGED = 10  # of them also generate: a generation costs dozens of passes


@dataclass(frozen=True)
class Restored:
    """What a set brings back, as shares of what was lost: of the log-odds, and of the prompts decided for refusal."""

    log_odds: float
    decisions: float


@dataclass(frozen=True)
class Found:
    """A set, what it restores on the selection prompts, alone and after each addition, and what the search cost."""

    chosen: tuple[Component, ...]
    restored: Restored
    path: tuple[tuple[Component, Restored], ...]
    passes: int


Measure = Callable[[Sequence[Component]], Restored]  # one forward pass over the selection prompts

NOTHING = Restored(0.0, 0.0)


def smallest_set(
    ranked: Sequence[Component], restored: Measure, *, target: float = TARGET, budget: int = BUDGET
) -> Found:
    """The smaller of what :func:`best_ranked` and :func:`greedy` find; where neither reaches ``target``, the better."""
    first = best_ranked(ranked, restored, target=target, budget=budget // 2)
    reached = first.restored.decisions >= target
    left = budget - first.passes - len(first.chosen)  # the last are for the path
    second = greedy(ranked, restored, target=target, budget=left, most=len(first.chosen) if reached else None)

    def merit(found: Found) -> tuple[bool, float, float]:
        there = found.restored.decisions >= target
        return there, -len(found.chosen) if there else found.restored.decisions, found.restored.log_odds

    passes = first.passes + second.passes
    if merit(second) >= merit(first):
        return replace(second, passes=passes)
    path = [(component, restored(first.chosen[: i + 1])) for i, component in enumerate(first.chosen)]
    return Found(first.chosen, first.restored, tuple(path), passes + len(path))


def best_ranked(
    ranked: Sequence[Component], restored: Measure, *, target: float = TARGET, budget: int = BUDGET
) -> Found:
    """The fewest best-ranked components that bring back ``target`` of the decisions, by bisection; then pruned, the
    lowest-ranked first. Empty where not even all of them do.
    """
    value = restored(ranked)
    if value.decisions < target:
        return Found((), NOTHING, (), 1)
    passes, low, high = 1, 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        tried = restored(ranked[:middle])
        passes += 1
        if tried.decisions >= target:
            high, value = middle, tried
        else:
            low = middle
    chosen, value, more = _pruned(list(ranked[:high]), value, restored, target, budget - passes)
    return Found(tuple(chosen), value, (), passes + more)


def greedy(
    ranked: Sequence[Component],
    restored: Measure,
    *,
    target: float = TARGET,
    budget: int = BUDGET,
    most: int | None = None,
) -> Found:
    """Add the candidate that restores most log-odds until ``target`` of the decisions is back, then prune.

    Stops when no pass is left, no candidate helps, or ``most`` are chosen. Candidates of a step are the best-ranked
    ones, ``budget`` / STEPS of them.
    """
    chosen: list[Component] = []
    path: list[tuple[Component, Restored]] = []
    left, passes, best = list(ranked), 0, NOTHING
    width, most = max(1, budget // STEPS), len(ranked) if most is None else most
    while left and len(chosen) < most and best.decisions < target and passes + min(width, len(left)) <= budget:
        measured = [(restored([*chosen, component]), component) for component in left[:width]]
        passes += len(measured)
        value, component = max(measured, key=lambda pair: pair[0].log_odds)  # ties: the better ranked
        if value.log_odds <= best.log_odds:
            break
        chosen.append(component)
        left.remove(component)
        path.append((component, value))
        best = value
    more = 0
    if best.decisions >= target:  # what was added first can be made needless by what came after
        chosen, best, more = _pruned(chosen[::-1], best, restored, target, budget - passes)
        chosen = chosen[::-1]
    return Found(tuple(chosen), best, tuple(path), passes + more)


def _pruned(
    chosen: list[Component], value: Restored, restored: Measure, target: float, budget: int
) -> tuple[list[Component], Restored, int]:
    """Leave out, from the last one on, what ``target`` does not need; the set, what it restores, passes."""
    passes = 0
    for component in chosen[::-1]:
        if len(chosen) == 1 or passes >= budget:
            break
        fewer = [other for other in chosen if other != component]
        tried = restored(fewer)
        passes += 1
        if tried.decisions >= target:
            chosen, value = fewer, tried
    return chosen, value, passes


def held_out_family(tasks: Sequence[Record]) -> str:
    """The category with most harmful tasks, the first by name where several have: none is chosen by result."""
    counts: dict[str, int] = {}
    for task in tasks:
        if task.label == "harmful" and task.category:
            counts[task.category] = counts.get(task.category, 0) + 1
    if len(counts) < 2:
        raise UserError("restoration: harmful tasks need at least two categories, so that one can be held out")
    return min(counts, key=lambda name: (-counts[name], name))


def restoration_study(
    models: Mapping[str, HookedModel],
    validation: Sequence[Record],
    test: Sequence[Record],
    make_env: MakeEnvironment,
    *,
    held_out: str = "",
    budget: int = BUDGET,
    max_turns: int = 5,
    max_new_tokens: int = 40,
    refusals: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """The section ``restoration`` of ``results.json``.

    Returns:
        ``chosen``, ``path``, ``components`` (how many there are), ``share`` of them chosen, ``forward_passes``; and
        under ``held_out`` and ``seen`` families on test tasks: ``restored`` (share of the lost log-odds),
        ``refusal_restored`` (share of the lost refusals, generated), rates of base, agent and patched, benign
        ``cost`` in success, and ``random`` sets.
    """
    base, agent = models["base"], models["agent"]
    check_pair(base, agent)
    family = held_out or held_out_family(validation)
    train = [task for task in validation if task.category != family and task.label == "harmful"]
    if not train or not any(task.category == family and task.label == "harmful" for task in test):
        raise UserError(f"restoration: no harmful validation task outside, or no test task inside, family {family!r}")
    ids = refusal_tokens(base, refusals)
    pair = _Pair(base, agent, ids, Donor(base), PromptCache(agent), make_env, max_turns, max_new_tokens, seed)
    rows = [agent.render(task.prompt()) for task in train]
    own, theirs = pair.log_odds(rows), refusal_log_odds(base, rows, ids)
    everything = all_components(agent)
    if not (theirs > 0).sum() > (own > 0).sum() or theirs.mean() <= own.mean():
        raise UserError(
            "restoration: the agent refuses as often as the base on these tasks; there is nothing to restore"
        )

    def restored(components: Sequence[Component]) -> Restored:
        progress(1)
        now = pair.log_odds(rows, components)
        decided = [float((values > 0).mean()) for values in (now, own, theirs)]
        return Restored(
            float((now - own).mean() / (theirs - own).mean()), (decided[0] - decided[1]) / (decided[2] - decided[1])
        )

    effects = estimate_effects(agent, pair.donor, where_answers_differ(agent, rows), final(), log_odds_of(ids))
    ranked = sorted(everything, key=lambda component: (-effects[component].mean(), component))
    ceiling = restored(everything)
    passes_before = 5  # base, agent, the ranking's forward and backward, the ceiling
    found = smallest_set(ranked, restored, budget=budget - passes_before)
    return plain(
        {
            "family": family,
            "families": sorted({task.category for task in train}),
            "chosen": [str(component) for component in found.chosen],
            "restored": asdict(found.restored),
            "path": [{"component": str(component), **asdict(value)} for component, value in found.path],
            "ceiling": asdict(ceiling),
            "components": len(everything),
            "share": len(found.chosen) / len(everything),
            "forward_passes": found.passes + passes_before,
            "target": TARGET,
            "held_out": _report(pair, [task for task in test if task.category == family], found.chosen),
            "seen": _report(pair, [task for task in test if task.category != family], found.chosen),
        }
    )


@dataclass(frozen=True)
class _Pair:
    """Base and agent, and how the agent's components are given the base's activations at the final token."""

    base: HookedModel
    agent: HookedModel
    ids: Sequence[int]  # refusal tokens
    donor: Donor
    prompts: PromptCache  # of the agent
    make_env: MakeEnvironment
    max_turns: int
    max_new_tokens: int
    seed: int

    def log_odds(self, rows: Sequence[Rendered], components: Sequence[Component] | None = None) -> np.ndarray:
        """The agent's refusal log-odds; with ``components``, those patched."""
        if components is None:
            return refusal_log_odds(self.agent, rows, self.ids)
        return refusal_log_odds(self.agent, rows, self.ids, self._patches(components), self.prompts)

    def patched(self, name: str, components: Sequence[Component]) -> Arm:
        return steered(name, self._patches(components))

    def refused(self, model: HookedModel, tasks: Sequence[Record], arm: Arm) -> list[float]:
        ran = self._episodes(model, tasks, arm, max_turns=1)
        return [float(episode.outcome() == "refused") for episode in ran]

    def done(self, tasks: Sequence[Record], arm: Arm) -> list[float | None]:
        ran = self._episodes(self.agent, tasks, arm, max_turns=self.max_turns)
        return [None if e.success is None else float(e.success and e.outcome() != "refused") for e in ran]

    def _episodes(self, model: HookedModel, tasks: Sequence[Record], arm: Arm, max_turns: int) -> list[Episode]:
        kept = self.prompts if model is self.agent else None
        options: dict[str, Any] = {"max_turns": max_turns, "max_new_tokens": self.max_new_tokens, "prompts": kept}
        return run_episodes(model, tasks, self.make_env, arm, **options)

    def _patches(self, components: Sequence[Component]) -> Any:
        return patch_components(self.donor, components, final())


def _report(pair: _Pair, tasks: Sequence[Record], chosen: Sequence[Component]) -> dict[str, Any]:
    """What the chosen set restores and costs on ``tasks``, and what random sets of its size restore."""
    base, agent, seed = pair.base, pair.agent, pair.seed
    pair = replace(pair, donor=Donor(base), prompts=PromptCache(agent))  # of these prompts alone
    harmful = [task for task in tasks if task.label == "harmful"]
    benign = [task for task in tasks if task.label == "benign"]
    rows, groups = [agent.render(task.prompt()) for task in harmful], group_ids(harmful)
    own = pair.log_odds(rows)
    lost = refusal_log_odds(base, rows, pair.ids) - own

    def restored(components: Sequence[Component]) -> Estimate:
        return ratio(pair.log_odds(rows, components) - own, lost, groups=groups, seed=seed)

    patched = pair.patched("patched", chosen)
    by_model = {
        "base": pair.refused(base, harmful, Arm("base", "base")),
        "agent": pair.refused(agent, harmful, Arm("agent")),
        "patched": pair.refused(agent, harmful, patched),
    }
    gone = np.subtract(by_model["base"], by_model["agent"])
    success = {"agent": pair.done(benign, Arm("agent")), "patched": pair.done(benign, patched)}

    def refusal_restored(refused: Sequence[float]) -> Estimate:
        return ratio(np.subtract(refused, by_model["agent"]), gone, groups=groups, seed=seed)

    rng = random.Random(seed)
    sets = [rng.sample(all_components(agent), len(chosen)) for _ in range(RANDOM_SETS)]
    judged = [
        refusal_restored(pair.refused(agent, harmful, pair.patched("random", picked)))
        for picked in sets[:RANDOM_JUDGED]
    ]
    values = [restored(picked).value for picked in sets]
    return {
        "restored": restored(chosen),
        "ceiling": restored(all_components(agent)),
        "refusal_restored": refusal_restored(by_model["patched"]),
        "refusal_rate": {name: rate(flags) for name, flags in by_model.items()},
        "success_rate": {name: rate(flags) for name, flags in success.items()},
        "cost": paired_difference(success["agent"], success["patched"], seed=seed),
        "random": {
            "n": len(sets),
            "restored": mean(values, seed=seed),
            "highest": float(np.nanmax(values)) if not np.isnan(values).all() else None,
            "refusal_restored": judged,
        },
    }
