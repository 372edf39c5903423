"""Episodes: an agent in its environments, one prompt a turn, all live episodes in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from pingscope.experiments.agents.actions import Call, parse_actions
from pingscope.experiments.agents.judges import Outcome, judge, judge_parsed, opening
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.chat.template import opens_thinking
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of
from pingscope.interp.generate.generation import GatedPrefix, Generation, generate
from pingscope.steering.decisions import GateSession
from pingscope.steering.injection import prefix_ids
from pingscope.steering.realignment import answer_again

if TYPE_CHECKING:
    from pingscope.interp.generate.prompt_cache import PromptCache
    from pingscope.interp.model.hooked import HookedModel
    from pingscope.steering.injection import Arm


class Environment(Protocol):
    """What an agent acts on. ``success`` is the environment's own rule: ``None`` where it cannot tell."""

    @property
    def done(self) -> bool: ...

    @property
    def success(self) -> bool | None: ...

    def page(self) -> str: ...

    def step(self, call: Call) -> None: ...


MakeEnvironment = Callable[[Record], Environment]


def environment_name(make_env: MakeEnvironment) -> str:
    """Which rules judged an episode, for the identity of a log: code is known by its name only."""
    return f"{make_env.__module__}.{getattr(make_env, '__qualname__', type(make_env).__qualname__)}"


class AnyAction:
    """For tasks without an environment: one step, any valid action ends it, and success stays unknown."""

    def __init__(self, record: Record) -> None:
        self._page = record.context
        self.done = False
        self.success: bool | None = None

    def page(self) -> str:
        return self._page

    def step(self, call: Call) -> None:
        self.done = True


@dataclass(frozen=True)
class Turn:
    """One answer: hash of the page it answers, the continuation (never the prefix), and how it parsed.

    ``tokens`` were generated, an end token included.
    """

    page: str
    text: str
    status: str
    finished: bool
    thinking: bool = False  # the prompt ended within a thought, which the text goes on with
    acted: bool | None = None  # whether the arm's gate was open; None: the arm has no gate
    tokens: int = 0


@dataclass(frozen=True)
class Episode:
    """One task under one arm. Holds no instruction text, so that logs of harmful tasks can be shared."""

    id: str
    label: str
    turns: tuple[Turn, ...]
    success: bool | None
    chat: bool = False
    prefix: str | None = None
    missing: str | None = None  # why there is no outcome: a prompt beyond the context, an environment that broke

    def outcome(self, mode: str = "strict") -> Outcome:
        """Refused if any turn is a refusal, otherwise what the last turn is; one that is missing counts nowhere."""
        if self.missing is not None or not self.turns:
            return "invalid"
        outcomes = [
            judge(
                turn.text,
                mode,
                chat=self.chat,
                prefix=None if turn.acted is False else self.prefix,
                thinking=turn.thinking,
            )
            for turn in self.turns
        ]
        return "refused" if "refused" in outcomes else outcomes[-1]

    def to_row(self) -> dict[str, Any]:
        """JSON form for a log; :meth:`from_row` reads it back."""
        return asdict(self) | {"turns": [asdict(turn) for turn in self.turns], "outcome": self.outcome()}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Episode:
        try:
            turns = tuple(Turn(**turn) for turn in row["turns"])
            kept = (row["id"], row["label"], turns, row["success"], row["chat"], row["prefix"])
            return cls(*kept, row.get("missing"))
        except (KeyError, TypeError) as error:
            raise UserError(f"generations: not a logged episode ({error}); delete that line") from error


Render = Callable[[Prompt], Rendered]
Answer = Callable[[Sequence[Rendered]], Sequence[Generation]]


@dataclass
class _Live:
    record: Record
    arm: Arm
    environment: Environment
    thinking: bool = False
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    missing: str | None = None

    def lose(self, reason: str) -> None:
        """End the episode without an outcome: it costs itself only."""
        self.over, self.missing = True, " ".join(reason.split())[:300]

    def prompt(self) -> Prompt:
        return self.arm.apply(replace(self.record.prompt(), page=self.environment.page() or None))

    def take(self, said: Generation, acted: bool | None = None) -> None:
        """Log one answer and act on it: a refusal, an exit or an answer without action ends the episode."""
        parsed = parse_actions(said.text, self.thinking)
        page = sha256_of(self.environment.page())[:16]
        tokens = len(said.ids) + said.finished
        self.turns.append(Turn(page, said.text, parsed.status, said.finished, self.thinking, acted, tokens))
        begun = opening(None if acted is False else self.arm.prefix, said.text)
        outcome = judge_parsed(parsed, chat=self.record.domain == "chat", opening=begun)
        if parsed.calls and outcome != "refused":
            try:
                self.environment.step(parsed.calls[0])
            except Exception as error:  # noqa: BLE001 - whatever an environment of somebody's does, others go on
                self.lose(f"the environment failed: {type(error).__name__}: {error}")
                return
        self.over = outcome != "complied" or not parsed.calls or self.environment.done

    def episode(self) -> Episode:
        chat, prefix = self.record.domain == "chat", self.arm.prefix
        success = None if self.missing is not None else self.environment.success
        return Episode(self.record.id, self.record.label, tuple(self.turns), success, chat, prefix, self.missing)


def run_episodes(
    model: HookedModel,
    records: Sequence[Record],
    make_env: MakeEnvironment,
    arm: Arm,
    *,
    max_turns: int = 6,
    max_new_tokens: int = 48,
    prompts: PromptCache | None = None,
    session: GateSession | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Run every record to its end under ``arm``, greedily; episodes come in the order of ``records``.

    Each turn is a fresh prompt with the current page (user: instruction, page, suffix), and the arm's prefix
    stands at the start of every turn's response. ``prompts`` keeps what was read of them for the next arm.
    ``progress`` is called with the number of episodes just ended. An arm with a gate decides on every row of every
    turn; ``session`` (default: a fresh one) remembers and logs for it.
    """
    if arm.gate is not None:
        arm.gate.check_model(model.fingerprint)
        session = session or GateSession(arm.gate)

    def answer(rows: Sequence[Rendered]) -> Sequence[Generation]:
        return _answers(model, rows, arm, max_new_tokens, session, prompts)

    pairs = [(arm, record) for record in records]
    soft = 0 if arm.soft is None else len(arm.soft)
    render = fitting(model, model.render, soft + max_new_tokens)
    return run_pairs(
        pairs, make_env, render, answer, max_turns=max_turns, session=session, progress=progress,
        thinking=thinks_first(model),
    )  # fmt: skip


def thinks_first(model: Any) -> bool:
    """Whether a model's chat template begins every answer with a thought."""
    return opens_thinking(getattr(model, "tokenizer", None))


def fitting(model: HookedModel, render: Render, max_new_tokens: int) -> Render:
    """``render``, refusing prompts that leave no room for an answer in the model's context."""

    def rendered(prompt: Prompt) -> Rendered:
        row = render(prompt)
        model.check_context([row], max_new_tokens)
        return row

    return rendered


def run_pairs(
    pairs: Sequence[tuple[Arm, Record]],
    make_env: MakeEnvironment,
    render: Render,
    answer: Answer,
    *,
    max_turns: int = 6,
    session: GateSession | None = None,
    progress: Callable[[int], None] | None = None,
    thinking: bool = False,
) -> list[Episode]:
    """Run every (arm, record) to its end, all live episodes of a turn in one call of ``answer``.

    A prompt that ``render`` refuses ends its own episode, which is then missing with the reason.

    Args:
        render, answer: how a prompt becomes a row, and what continues rows. Rows of the same ids are asked once, so
            arms must differ in their text, not in edits.
        thinking: whether the prompts end within a thought.
        session: of the gate of the arm, where there is one: every row is asked and told whether its gate was open.
    """
    if max_turns < 1:
        raise UserError(f"max_turns {max_turns} is not positive; give at least 1")
    episodes = [_Live(record, arm, make_env(record), thinking) for arm, record in pairs]
    said: dict[tuple[int, ...], Generation] = {}  # a page that did not change gets the same greedy answer
    for _ in range(max_turns):
        live, rows, lost = [], [], 0
        for episode in episodes:
            if not episode.over:
                try:
                    rows.append(render(episode.prompt()))
                    live.append(episode)
                except UserError as error:  # one page that is too long, or cannot be rendered, costs its own task
                    episode.lose(str(error))
                    lost += 1
        if progress is not None and lost:
            progress(lost)
        if not live:
            break
        if session is not None:  # what a gate decides may depend on the row's history, so nothing is shared
            answers = answer(rows)
            for episode, row, one in zip(live, rows, answers, strict=True):
                episode.take(one, session.is_open(row.id))
            session.end_step(dict(zip((row.id for row in rows), answers, strict=True)))
        else:
            fresh = list({row.ids: row for row in rows if row.ids not in said}.values())
            said.update(zip((row.ids for row in fresh), answer(fresh) if fresh else [], strict=True))
            for episode, row in zip(live, rows, strict=True):
                episode.take(said[row.ids])
        if progress is not None:
            progress(sum(episode.over for episode in live))
    if progress is not None:
        progress(sum(not episode.over for episode in episodes))
    return [episode.episode() for episode in episodes]


def _answers(
    model: HookedModel,
    rows: Sequence[Rendered],
    arm: Arm,
    max_new_tokens: int,
    session: GateSession | None = None,
    prompts: PromptCache | None = None,
) -> list[Generation]:
    """What an arm says after each row."""
    if arm.header_after is not None:
        return answer_again(model, rows, arm.header_after, max_new_tokens, arm.live_edits(session), prompts)
    if arm.soft is not None:
        soft = arm.soft.embeddings
        return generate(model, rows, max_new_tokens=max_new_tokens, edits=arm.live_edits(), soft=soft)
    if session is not None and arm.prefix:
        opened = GatedPrefix(session, prefix_ids(model, arm.prefix))
        return generate(model, rows, max_new_tokens=max_new_tokens, edits=arm.live_edits(session), prefix=opened)
    return generate(model, rows, max_new_tokens=max_new_tokens, edits=arm.live_edits(session), prompts=prompts)


def prompts_of(
    model: HookedModel, record: Record, said: Sequence[str], make_env: MakeEnvironment, arm: Arm
) -> list[Rendered]:
    """The prompts an agent was shown, one a turn, rebuilt from what it answered to the earlier ones."""
    return [model.render(prompt) for prompt in asked_prompts(record, said, make_env, arm, thinks_first(model))]


def asked_prompts(
    record: Record, said: Sequence[str], make_env: MakeEnvironment, arm: Arm, thinking: bool = False
) -> list[Prompt]:
    """:func:`prompts_of` before they are rendered."""
    episode = _Live(record, arm, make_env(record), thinking)
    prompts = []
    for text in said:
        prompts.append(episode.prompt())
        episode.take(Generation(record.id, text, (), True))
    return prompts
