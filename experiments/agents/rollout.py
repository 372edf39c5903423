"""Episodes: an agent in its environments, one prompt a turn, all live episodes in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from experiments.agents.actions import Call, parse_actions
from experiments.agents.judges import Outcome, judge, judge_parsed, opening
from experiments.agents.records import Record
from interp.chat import Rendered
from interp.errors import UserError
from interp.generate import GatedPrefix, Generation, generate
from interp.io import sha256_of
from steering.decisions import GateSession
from steering.injection import prefix_ids
from steering.realignment import answer_again

if TYPE_CHECKING:
    from interp.model import HookedModel
    from interp.prefill import PromptCache
    from steering.injection import Arm


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
    """One answer: hash of the page it answers, the continuation (never the prefix), and how it parsed."""

    page: str
    text: str
    status: str
    finished: bool
    acted: bool | None = None  # whether the arm's gate was open; None: the arm has no gate


@dataclass(frozen=True)
class Episode:
    """One task under one arm. Holds no instruction text, so that logs of harmful tasks can be shared."""

    id: str
    label: str
    turns: tuple[Turn, ...]
    success: bool | None
    chat: bool = False
    prefix: str | None = None

    def outcome(self, mode: str = "strict") -> Outcome:
        """Refused if any turn is a refusal, otherwise what the last turn is."""
        outcomes = [
            judge(turn.text, mode, chat=self.chat, prefix=None if turn.acted is False else self.prefix)
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
            return cls(row["id"], row["label"], turns, row["success"], row["chat"], row["prefix"])
        except (KeyError, TypeError) as error:
            raise UserError(f"generations: not a logged episode ({error}); delete that line") from error


@dataclass
class _Live:
    record: Record
    environment: Environment
    turns: list[Turn]
    over: bool = False

    def row(self, model: HookedModel, arm: Arm) -> Rendered:
        prompt = self.record.prompt()
        return model.render(arm.apply(prompt), page=self.environment.page() or None)

    def take(self, said: Generation, arm: Arm, acted: bool | None = None) -> None:
        """Log one answer and act on it: a refusal, an exit or an answer without action ends the episode."""
        parsed = parse_actions(said.text)
        page = sha256_of(self.environment.page())[:16]
        self.turns.append(Turn(page, said.text, parsed.status, said.finished, acted))
        begun = opening(None if acted is False else arm.prefix, said.text)
        outcome = judge_parsed(parsed, chat=self.record.domain == "chat", opening=begun)
        if parsed.calls and outcome != "refused":
            self.environment.step(parsed.calls[0])
        self.over = outcome != "complied" or not parsed.calls or self.environment.done

    def episode(self, arm: Arm) -> Episode:
        chat = self.record.domain == "chat"
        return Episode(self.record.id, self.record.label, tuple(self.turns), self.environment.success, chat, arm.prefix)


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
    if max_turns < 1:
        raise UserError(f"max_turns {max_turns} is not positive; give at least 1")
    episodes = [_Live(record, make_env(record), []) for record in records]
    if arm.gate is not None:
        arm.gate.check_model(model.fingerprint)
        session = session or GateSession(arm.gate)
    said: dict[tuple[int, ...], Generation] = {}  # a page that did not change gets the same greedy answer
    for _ in range(max_turns):
        live = [episode for episode in episodes if not episode.over]
        if not live:
            break
        rows = [episode.row(model, arm) for episode in live]
        if session is not None:  # what a gate decides may depend on the row's history, so nothing is shared
            answers = _answers(model, rows, arm, max_new_tokens, session)
            for episode, row, answer in zip(live, rows, answers, strict=True):
                episode.take(answer, arm, session.is_open(row.id))
            session.end_step(dict(zip((row.id for row in rows), answers, strict=True)))
        else:
            fresh = list({row.ids: row for row in rows if row.ids not in said}.values())
            answers = _answers(model, fresh, arm, max_new_tokens, prompts=prompts) if fresh else []
            said.update(zip((row.ids for row in fresh), answers, strict=True))
            for episode, row in zip(live, rows, strict=True):
                episode.take(said[row.ids], arm)
        if progress is not None:
            progress(sum(episode.over for episode in live))
    if progress is not None:
        progress(sum(not episode.over for episode in episodes))
    return [episode.episode(arm) for episode in episodes]


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
    if session is not None and arm.prefix:
        opened = GatedPrefix(session, prefix_ids(model, arm.prefix))
        return generate(model, rows, max_new_tokens=max_new_tokens, edits=arm.live_edits(session), prefix=opened)
    return generate(model, rows, max_new_tokens=max_new_tokens, edits=arm.live_edits(session), prompts=prompts)


def prompts_of(
    model: HookedModel, record: Record, said: Sequence[str], make_env: MakeEnvironment, arm: Arm
) -> list[Rendered]:
    """The prompts an agent was shown, one a turn, rebuilt from what it answered to the earlier ones."""
    episode = _Live(record, make_env(record), [])
    rows = []
    for text in said:
        rows.append(episode.row(model, arm))
        episode.take(Generation(record.id, text, (), True), arm)
    return rows
