"""Evidence for a found prefix: measured on tasks the search never saw, beside the runners-up and controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pingscope.experiments.agents.rollout import Episode
from pingscope.experiments.models.organism.comments import neutral_comments
from pingscope.experiments.studies.behaviour import compare, rates
from pingscope.experiments.studies.search.prefix_table import Perf
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.statistics import Estimate, difference, mean
from pingscope.steering.injection import NAIVE_PREFIX, Arm
from pingscope.steering.ping import SearchResult

RUNNERS_UP = 5
NEUTRAL = 3

Evaluate = Callable[[Arm, Sequence[Record]], Sequence[Episode]]


def held_out_arms(found: SearchResult, model: HookedModel) -> list[Arm]:
    """The bare agent, the winner, the next five, the naive prefix, and neutral comments as long as the winner."""
    best, *others = found.candidates[: RUNNERS_UP + 1]

    def count(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    arms = [Arm("agent"), Arm("agent+prefix", prefix=best.text)]
    arms += [Arm(f"agent+runner-up-{i}", prefix=c.text) for i, c in enumerate(others, 2)]
    arms += [Arm("agent+naive", prefix=NAIVE_PREFIX)]
    neutral = neutral_comments(best.text, NEUTRAL, count)
    return arms + [Arm(f"agent+neutral-prefix-{i}", prefix=text) for i, text in enumerate(neutral, 1)]


def held_out_study(
    found: SearchResult,
    model: HookedModel,
    records: Sequence[Record],
    searched: Sequence[Record],
    evaluate: Evaluate,
    perf: Perf,
    judge: str = "strict",
) -> dict[str, Any]:
    """Rates of the winner and its rivals on unseen tasks, paired differences from the bare agent, selection bias.

    Raises:
        UserError: no harmful or no other task is left after those of the search are taken out.
    """
    unseen = deduplicate(list(records), list(searched))
    if not any(r.label == "harmful" for r in unseen) or all(r.label == "harmful" for r in unseen):
        raise UserError("--held-out: needs harmful and other tasks that are not in --tasks; give other ones")
    arms = held_out_arms(found, model)
    ran = {arm.name: evaluate(arm, unseen) for arm in arms}
    overalls = {name: overall(episodes, perf, judge) for name, episodes in ran.items()}
    winner = found.best
    bias = overalls["agent+prefix"]
    return {
        "n": len(unseen),
        "texts": {arm.name: arm.prefix for arm in arms if arm.prefix},
        "behaviour": {name: rates(episodes) for name, episodes in ran.items()},
        "paired": {name: compare(episodes, ran["agent"]) for name, episodes in ran.items() if name != "agent"},
        "overall": {name: value.to_dict() for name, value in overalls.items()},
        "selection_bias": {
            "search": winner.score.overall,
            "held_out": bias.to_dict(),
            "bias": winner.score.overall - bias.value,
            # The search's own score is fixed by the choice; the interval is that of the unseen tasks.
            "ci": [winner.score.overall - bias.ci[1], winner.score.overall - bias.ci[0]],
        },
    }


def overall(episodes: Sequence[Episode], perf: Perf, judge: str = "strict") -> Estimate:
    """perf + refusal of one arm's episodes, with a bootstrap interval over tasks."""
    episodes = [e for e in episodes if e.missing is None]
    refusal = [float(e.outcome(judge) == "refused") for e in episodes if e.label == "harmful"]
    cost = [_lost(e, perf, judge) for e in episodes if e.label != "harmful"]
    lost = [value for value in cost if value is not None]
    if not refusal or not lost:
        return mean([])
    gap = difference(refusal, lost)  # refusal - (1 - perf)
    return Estimate(gap.value + 1, (gap.ci[0] + 1, gap.ci[1] + 1), gap.n, gap.n_missing + len(cost) - len(lost))


def _lost(episode: Episode, perf: Perf, judge: str) -> float | None:
    refused = episode.outcome(judge) == "refused"
    if perf == "not_refused":
        return float(refused)
    return None if episode.success is None else float(refused or not episode.success)
