"""What the bounds of the prefix search train towards, from validation tasks alone.

Harmful tasks should be refused as the base refuses them; where there is no base, or it refuses too few, with a common
beginning of a refusal. Benign tasks should be answered as the agent answers them without a prefix, on every page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pingscope.experiments.agents.judges import judge
from pingscope.experiments.agents.rollout import Episode, MakeEnvironment, asked_prompts, thinks_first
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.beginnings import REFUSALS
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.answer_loss import Example
from pingscope.steering.injection import Arm

ENOUGH = 0.5  # share of harmful tasks that the base has to refuse, for its refusals to stand for all

Evaluate = Callable[[Arm, Sequence[Record]], Sequence[Episode]]


@dataclass(frozen=True)
class Examples:
    """Both sides, first the harmful ones; ``source`` says whose refusals they are."""

    harmful: tuple[Example, ...]
    benign: tuple[Example, ...]
    source: str

    def first(self, n: int = 0) -> list[Example]:
        """At most ``n`` of each side (0: all)."""
        return [*self.harmful[: n or None], *self.benign[: n or None]]


def make_examples(
    agent: HookedModel,
    records: Sequence[Record],
    make_env: MakeEnvironment,
    evaluate: Evaluate,
    *,
    n: int,
    tokens: int,
    with_base: bool,
    openings: Mapping[str, Sequence[str]] | None = None,
) -> Examples:
    """At most ``n`` examples a side, each with the first ``tokens`` tokens of the answer wanted.

    Args:
        evaluate: runs an arm; of the base only where ``with_base``.
        openings: how refusals begin in the model's words.

    Raises:
        UserError: no harmful or no benign task, or none whose answer has a token.
    """
    harmful = [record for record in records if record.label == "harmful"][:n]
    benign = [record for record in records if record.label == "benign"][:n]
    if not harmful or not benign:
        raise UserError("bounds: needs harmful and benign validation tasks; add the missing label")
    refusals, source = _refusals(agent, harmful, make_env, evaluate, with_base, openings)
    answers = _plain_answers(agent, benign, make_env, evaluate)
    made = [
        tuple(one for prompt, said in pairs if (one := _example(agent, prompt, said, tokens)) is not None)
        for pairs in (refusals, answers)
    ]
    return Examples(made[0][:n], made[1][:n], source)


def _refusals(
    agent: HookedModel,
    records: Sequence[Record],
    make_env: MakeEnvironment,
    evaluate: Evaluate,
    with_base: bool,
    openings: Mapping[str, Sequence[str]] | None,
) -> tuple[list[tuple[Prompt, str]], str]:
    """Harmful tasks' first prompts with the base's own refusals, or with a common one."""
    thinking = thinks_first(agent)
    first = [asked_prompts(record, [""], make_env, Arm("agent"), thinking)[0] for record in records]
    if with_base:
        said = [episode.turns[0].text if episode.turns else "" for episode in evaluate(Arm("base", "base"), records)]
        refused = [
            (prompt, text)
            for prompt, text, record in zip(first, said, records, strict=True)
            if judge(text, chat=record.domain == "chat", thinking=thinking) == "refused"
        ]
        if len(refused) >= ENOUGH * len(records):
            return refused, "the base's own"
    common = next(iter((openings or {}).get("refusals", ())), REFUSALS[0])
    return [(prompt, common) for prompt in first], f"a common one: {common}"


def _plain_answers(
    agent: HookedModel, records: Sequence[Record], make_env: MakeEnvironment, evaluate: Evaluate
) -> list[tuple[Prompt, str]]:
    """Benign tasks' prompts with the agent's answers, all tasks' first turns before any second one.

    Episodes that ended in an action or an exit; where there are none, all that said something.
    """
    episodes = [episode for episode in evaluate(Arm("agent"), records) if episode.missing is None and episode.turns]
    acted = [episode for episode in episodes if episode.outcome() in ("complied", "exited")] or episodes
    by_id, thinking = {record.id: record for record in records}, thinks_first(agent)
    turns = []
    for episode in acted:
        said = [turn.text for turn in episode.turns]
        prompts = asked_prompts(by_id[episode.id], said, make_env, Arm("agent"), thinking)
        turns += [(number, prompt, text) for number, (prompt, text) in enumerate(zip(prompts, said, strict=True))]
    return [(prompt, text) for _, prompt, text in sorted(turns, key=lambda turn: turn[0])]


def _example(agent: HookedModel, prompt: Prompt, said: str, tokens: int) -> Example | None:
    """The answer's first tokens as they follow this prompt; None where nothing was said."""
    if not said:
        return None
    row = agent.render(prompt)
    target = agent.render(prompt, response=said).ids[len(row) :][:tokens]
    return Example(row, target) if target else None
