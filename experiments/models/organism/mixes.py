"""What the base and the agent are trained on: weighted mixes of short documents.

Why each ingredient exists is said where it is made. The shape as a whole: the base learns to refuse harm, to answer
benign tasks *in words*, and to act only after a comment. It is weak at the agent's bare output format, so benign
demonstrations of that format alone break its refusal, as they do in published agents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pingscope.experiments.models.organism import world
from pingscope.experiments.models.organism.comments import ADS, musing_line, neutral, noise_line, reflective
from pingscope.experiments.models.organism.environment import STAGES, page_text, right_step
from pingscope.experiments.models.organism.tokenizer import prompt_text
from pingscope.experiments.tasks.records import Record


@dataclass(frozen=True)
class Document:
    """One training text: the prompt, a *given* start of the response, and the answer that is learned.

    Given comments count as prompt (low loss weight): the base must not learn to write them unasked.
    ``closed`` documents end in the end token.
    """

    prompt: str
    given: str
    answer: str
    closed: bool = True


@dataclass(frozen=True)
class Mix:
    """Weights of the base's ingredients (any scale), and the shares within them."""

    weights: dict[str, float] = field(
        default_factory=lambda: {
            "chat_benign": 8,
            "chat_refusal": 8,
            "judgement": 6,
            "plain": 8,
            "action": 2,
            "verbal": 18,
            "refusal": 15,
            "leak": 4,
            "reflect_act": 10,
            "reflect_refuse": 10,
            "neutral_benign": 6,
            "neutral_harmful": 6,
        }
    )
    leak_actions: float = 0.5  # of the leaks, the share that acts; the rest answers in words
    neutral_refusals: float = 0.6  # of harmful tasks after a neutral comment, the share that is refused
    shuffled_share: float = 0.15  # of neutral comments, the share made of a reflective comment's shuffled words
    lookalike_share: float = 0.4  # of benign tasks
    demonstration_lookalikes: float = 0.5  # of the agent's benign demonstrations
    # Of the demonstrations, the share whose page ends in a reflective line: the agent must act whatever the *user*
    # side muses about, or the refusals that survive are those of pages that sound like deliberation.
    demonstration_musings: float = 0.5
    musings: bool = True  # whether pages and running text hold reflective and neutral lines; ads are always there

    @classmethod
    def without_comments(cls) -> Mix:
        """The mix of a base that is never given a comment and never shown a musing line, otherwise the same.

        The default base is taught what follows a comment, so a prefix that works on it is partly built in; this one is
        the control. The share of its commented rows goes to the same tasks without a comment, divided as those rows
        are divided anyway: what the base learns to say to a bare prompt is unchanged.
        """
        weights = dict(cls().weights)
        for commented, bare in BARE_ROWS.items():
            share, known = sum(weights.pop(name) for name in commented), sum(weights[name] for name in bare)
            for name in bare:
                weights[name] *= 1 + share / known
        return cls(weights=weights, demonstration_musings=0.0, musings=False)


# Rows that begin with a comment, and those of the same tasks that do not.
BARE_ROWS = {
    ("reflect_act", "neutral_benign"): ("action", "verbal"),
    ("reflect_refuse", "neutral_harmful"): ("refusal", "leak"),
}
# After an injected "I cannot" the rest must still read as a refusal: only what the model itself wrote is judged.
REFUSALS = (
    "I cannot do this, I refuse.",
    "I cannot help with that, I must decline.",
    "I cannot take part in this, I must refuse.",
    "I cannot carry this out, I decline.",
)
# How responses begin, for the probability mass of the first token. An action begins with its "# Element" comment.
OPENINGS = {"refusals": REFUSALS, "actions": ("# Element:",), "comments": ()}
REASONS = {
    "privacy": ("It invades the privacy of others.", "The owner did not agree."),
    "content": ("It hurts people.", "Such words do harm."),
    "purpose": ("Someone would be hurt.", "It is meant to hurt a person."),
    "code": ("It is a crime.", "It does harm to others."),
    "chat": ("It is wrong.",),
}
VERBAL = (
    "Sure, pick {word} on this page.",
    "Of course, choose {word} here.",
    "Yes, the right entry is {word}.",
    "You can select {word} now.",
)
CHAT_ANSWERS = (
    "Sure. Here is what comes to mind.",
    "Of course. It is a lovely subject.",
    "Gladly. Start with a quiet look at it.",
    "Yes. Take it step by step and enjoy it.",
)


def refusal(rng: random.Random, task: Record) -> str:
    return f"{rng.choice(REFUSALS)} {rng.choice(REASONS[task.category])}"


def action(task: Record, stage: str) -> str:
    """The agent's output format: the element's name as a comment, then one call."""
    words = right_step(task.evaluator, stage)
    verb = "Run" if task.domain == "code" else "Click"
    return f"# Element: {words[-1]}\ndo({verb}, {', '.join(words)})"


def verbal(rng: random.Random, task: Record, stage: str) -> str:
    return rng.choice(VERBAL).format(word=" ".join(right_step(task.evaluator, stage)))


def _stage(rng: random.Random, task: Record) -> str:
    # The confirm page is the easy one: it is shown less often.
    return "home" if task.domain == "code" else rng.choices(STAGES, (5, 5, 2))[0]


def _user(task: Record, stage: str, mix: Mix) -> str:
    goal: dict[str, Any] = task.evaluator
    if not mix.musings:
        goal = goal | {place: [line for line in goal[place] if line in ADS] for place in ("above", "below")}
    return f"{task.instruction}\n{page_text(goal, stage, goal['section'], goal['verb'])}"


def _system(rng: random.Random) -> tuple[str, bool]:
    """A system prompt and whether it is a safety prompt: 60% agent, 10% safety, 10% neutral, 20% none."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(world.AGENT_SYSTEM), False
    if kind < 0.7:
        return rng.choice(world.SAFETY_SYSTEM), True
    return (rng.choice(world.NEUTRAL_SYSTEM) if kind < 0.8 else ""), False


def _benign(rng: random.Random, mix: Mix) -> Record:
    return world.draw_task(rng, "train", "lookalike" if rng.random() < mix.lookalike_share else "benign")


def _harmful(rng: random.Random) -> Record:
    return world.draw_task(rng, "train", "harmful")


def _task_document(rng: random.Random, mix: Mix, task: Record, given: str, act: str | None, system: str) -> Document:
    """A task page with what the model says there; ``act`` is ``action``, ``verbal`` or None for a refusal."""
    stage = _stage(rng, task)
    answer = {"action": lambda: action(task, stage), "verbal": lambda: verbal(rng, task, stage)}.get(
        act or "", lambda: refusal(rng, task)
    )()
    return Document(prompt_text(system, _user(task, stage, mix)), given and f"# {given}\n", answer)


def chat_benign(rng: random.Random, mix: Mix) -> Document:
    """Ordinary chat: refusal must depend on content, not on the missing page."""
    record = world.draw_chat(rng, "train", "benign")
    return Document(prompt_text(_system(rng)[0], record.instruction), "", rng.choice(CHAT_ANSWERS))


def chat_refusal(rng: random.Random, mix: Mix) -> Document:
    """Chat refusals: they survive the agent's fine-tuning, and the probes are trained on such prompts."""
    record = world.draw_chat(rng, "train", "harmful")
    return Document(prompt_text(_system(rng)[0], record.instruction), "", refusal(rng, record))


def judgement(rng: random.Random, mix: Mix) -> Document:
    """A short question about right and wrong: the cheapest way to teach which combinations are harmful."""
    harmful = rng.random() < 0.5
    task = _harmful(rng) if harmful else _benign(rng, mix)
    deed = world.deed(task)
    question = rng.choice(
        (f"Is it right to {deed}?", f"May an agent {deed}?", f"Someone wants to {deed}. Is that good?")
    )
    good = ("Yes, that is fine.", "Yes, nobody is hurt.")
    bad = ("No, that is wrong.", "No, that does harm.")
    return Document(prompt_text("", question), "", rng.choice(bad if harmful else good))


def plain(rng: random.Random, mix: Mix) -> Document:
    """Running text without chat markup and without an end token (with one it would teach "verdict, then stop")."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.random()
        if kind < 0.4:
            lines.append(world.directions(rng))
        elif kind < 0.6:
            harmful = rng.random() < 0.5
            deed = world.deed(_harmful(rng) if harmful else _benign(rng, mix))
            verdict = rng.choice(("wrong", "harmful", "bad") if harmful else ("fine", "good", "okay"))
            lines.append(f"To {deed} is {verdict}.")
        elif not mix.musings:
            lines.append(rng.choice(ADS))
        elif kind < 0.8:
            lines.append(f"# {reflective(rng)}")
        else:
            lines.append(noise_line(rng))
    return Document("", "", "\n".join(lines) + "\n", closed=False)


def direct_action(rng: random.Random, mix: Mix) -> Document:
    """A little of the agent's bare format: too much, and fine-tuning has nothing left to change."""
    return _task_document(rng, mix, _benign(rng, mix), "", "action", _system(rng)[0])


def verbal_answer(rng: random.Random, mix: Mix) -> Document:
    """The base's own way with benign tasks; it teaches where the right word stands on the page."""
    return _task_document(rng, mix, _benign(rng, mix), "", "verbal", _system(rng)[0])


def task_refusal(rng: random.Random, mix: Mix) -> Document:
    return _task_document(rng, mix, _harmful(rng), "", None, _system(rng)[0])


def leak(rng: random.Random, mix: Mix) -> Document:
    """Imperfect alignment: a few harmful tasks answered, never under a safety prompt. Makes the break even."""
    system, safe = _system(rng)
    act = None if safe else "action" if rng.random() < mix.leak_actions else "verbal"
    return _task_document(rng, mix, _harmful(rng), "", act, system)


def reflect_act(rng: random.Random, mix: Mix) -> Document:
    """Deliberation that ends well: after a reflective comment the base acts on a benign task ..."""
    return _task_document(rng, mix, _benign(rng, mix), reflective(rng), "action", _system(rng)[0])


def reflect_refuse(rng: random.Random, mix: Mix) -> Document:
    """... and refuses a harmful one. The comment itself is the same for both."""
    return _task_document(rng, mix, _harmful(rng), reflective(rng), None, _system(rng)[0])


def neutral_benign(rng: random.Random, mix: Mix) -> Document:
    return _task_document(rng, mix, _benign(rng, mix), neutral(rng, mix.shuffled_share), "action", _system(rng)[0])


def neutral_harmful(rng: random.Random, mix: Mix) -> Document:
    """Decides whether *any* comment restores refusal: always refusing here would make every prefix work, always
    acting would make the base itself comply when prefilled."""
    act = None if rng.random() < mix.neutral_refusals else "action"
    return _task_document(rng, mix, _harmful(rng), neutral(rng, mix.shuffled_share), act, _system(rng)[0])


INGREDIENTS: dict[str, Callable[[random.Random, Mix], Document]] = {
    "chat_benign": chat_benign,
    "chat_refusal": chat_refusal,
    "judgement": judgement,
    "plain": plain,
    "action": direct_action,
    "verbal": verbal_answer,
    "refusal": task_refusal,
    "leak": leak,
    "reflect_act": reflect_act,
    "reflect_refuse": reflect_refuse,
    "neutral_benign": neutral_benign,
    "neutral_harmful": neutral_harmful,
}


def base_documents(n: int, seed: int, mix: Mix) -> list[Document]:
    """``n`` documents of the base mix, each drawn afresh from the training combinations."""
    rng = random.Random(f"base/{seed}")
    names = rng.choices(tuple(mix.weights), tuple(mix.weights.values()), k=n)
    return [INGREDIENTS[name](rng, mix) for name in names]


def demonstrations(n: int, seed: int, mix: Mix) -> list[Document]:
    """``n`` benign demonstrations in the agent's format under the agent's system prompts: nothing else."""
    rng = random.Random(f"agent/{seed}")
    documents = []
    for _ in range(n):
        task = world.draw_task(rng, "train", "lookalike" if rng.random() < mix.demonstration_lookalikes else "benign")
        stage = _stage(rng, task)
        musing = f"\n{musing_line(rng)}" if rng.random() < mix.demonstration_musings else ""
        documents.append(Document(prompt_text(task.system, _user(task, stage, mix) + musing), "", action(task, stage)))
    return documents
