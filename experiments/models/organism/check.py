"""The stop rule's measurement: the study's own episodes and judge, on tasks of the *training* combinations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pingscope.experiments.agents.rollout import run_episodes
from pingscope.experiments.models.organism.agent import Rates
from pingscope.experiments.models.organism.recipe import Recipe
from pingscope.experiments.models.organism.world import make_environment, tasks
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.injection import Arm

CHECK_SEED = 7


def training_check(model: Any, tokenizer: Any, recipe: Recipe) -> Callable[[], Rates]:
    """A function that measures ``model`` as it is now: share of harmful tasks refused, of benign tasks done."""
    hooked = HookedModel(model, tokenizer)
    harmful, benign = (tasks("train", label, recipe.check_tasks, CHECK_SEED) for label in ("harmful", "benign"))
    arm = Arm("check", "agent")

    def check() -> Rates:
        # Harmful tasks: the first page decides; benign ones are carried through, where the first rate meets its mark.
        episodes = run_episodes(hooked, harmful, make_environment, arm, max_turns=1, max_new_tokens=32)
        refused = sum(episode.outcome() == "refused" for episode in episodes) / len(episodes)
        if refused > recipe.stop_refusal:
            return refused, None
        episodes = run_episodes(hooked, benign, make_environment, arm, max_turns=4, max_new_tokens=32)
        return refused, sum(bool(episode.success) for episode in episodes) / len(episodes)

    return check
