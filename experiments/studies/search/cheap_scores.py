"""Scores that generate nothing behind a prefix: how far it turns each task towards refusal, 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from pingscope.experiments.agents.judges import decided
from pingscope.experiments.agents.rollout import MakeEnvironment, run_pairs, thinks_first
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.beginnings import token_classes
from pingscope.interp.chat.prefixed import PrefixRenderer
from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.generation import Generation
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.interp.model.selection import final
from pingscope.steering.injection import Arm

# (prefixes, task indices) -> how far each task leans to refusal behind each prefix.
Cheap = Callable[[Sequence[str], Sequence[int]], Float[np.ndarray, "prefix task"]]

GREEDY = 0.8  # share of a leaning that is what greedy decoding would do


class Leaning:
    """What the model makes of the beginning of its answer behind a prefix.

    A task leans to refusal by the odds of refusal starts against action and comment starts in the first token's
    distribution. Greedy decoding follows the likeliest token, so what it would do is most of a leaning; the probability
    tells near decisions from clear ones. With ``plain``, harmless tasks are read by how unlikely it has become that the
    agent answers every page as it does without a prefix: that also sees a prefix that confuses it.

    Args:
        examples: beginnings of ``refusals``, ``actions`` and ``comments`` in the model's words; default: common ones.
        plain: runs episodes without a prefix.

    Raises:
        UserError: no token begins a refusal, or none begins an action.
    """

    def __init__(
        self,
        engine: SharedPrefill,
        render: PrefixRenderer,
        records: Sequence[Record],
        examples: Mapping[str, Sequence[str]] | None = None,
        plain: PlainEpisodes | None = None,
    ) -> None:
        self.engine, self.render, self.records, self.plain = engine, render, records, plain
        classes = token_classes(engine.model.tokenizer, **(examples or {}))
        self._yes, self._no = list(classes["refusal"]), [*classes["action"], *classes["comment"]]
        if not self._yes or not self._no:
            raise UserError("screening: no token begins a refusal or an action; give examples in the model's words")
        self._known: dict[tuple[str, int], float] = {}

    @property
    def tokens(self) -> int:
        """Generated so far: the plain episodes."""
        return self.plain.tokens if self.plain is not None else 0

    def __call__(self, texts: Sequence[str], tasks: Sequence[int]) -> Float[np.ndarray, "prefix task"]:
        wanted = [(text, int(i)) for text in texts for i in tasks]
        todo = list(dict.fromkeys(pair for pair in wanted if pair not in self._known))
        closely = [pair for pair in todo if self.plain is not None and self.records[pair[1]].label != "harmful"]
        self._known |= self._departing(closely)
        self._known |= self._refusing([pair for pair in todo if pair not in self._known])
        return np.array([self._known[pair] for pair in wanted]).reshape(len(texts), len(tasks))

    def _refusing(self, pairs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
        rows = [self._row(text, self.records[i].prompt()) for text, i in pairs]
        logits = self.engine.next_token_logits(rows, [*self._yes, *self._no])
        odds = logits[:, : len(self._yes)].logsumexp(-1) - logits[:, len(self._yes) :].logsumexp(-1)
        leaning = GREEDY * (odds > 0) + (1 - GREEDY) * odds.sigmoid()
        return dict(zip(pairs, leaning.tolist(), strict=True))

    def _departing(self, pairs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
        if self.plain is None or not pairs:
            return {}
        self.plain.run([self.records[i] for i in {i for _, i in pairs}])
        turns = [(pair, *turn) for pair in pairs for turn in self.plain.turns[self.records[pair[1]].id]]
        rows = [self._row(pair[0], prompt) for pair, prompt, _ in turns]
        found = self.engine.answer_log_probs(rows, [said for *_, said in turns])
        likely, greedy = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, True)
        for (pair, *_), log_prob, same in zip(turns, *(x.tolist() for x in found), strict=True):
            likely[pair] += log_prob
            greedy[pair] &= same
        done = {pair: self.plain.success[self.records[pair[1]].id] for pair in pairs}
        same_answers = {pair: GREEDY * greedy[pair] + (1 - GREEDY) * math.exp(likely[pair]) for pair in pairs}
        return {pair: 1 - done[pair] * same_answers[pair] for pair in pairs}

    def _row(self, text: str, prompt: Prompt) -> Rendered:
        return self.render(Arm("", prefix=text).apply(prompt))


class PlainEpisodes:
    """Episodes without a prefix, each task's once: what was answered to which prompt, and whether the task was done."""

    def __init__(
        self, engine: SharedPrefill, render: PrefixRenderer, make_env: MakeEnvironment, max_turns: int, max_tokens: int
    ) -> None:
        self.engine, self.render, self.make_env = engine, render, make_env
        self.max_turns, self.max_tokens = max_turns, max_tokens
        self.thinking = thinks_first(engine.model)
        self.tokens = 0
        self.turns: dict[str, list[tuple[Prompt, tuple[int, ...]]]] = {}
        self.success: dict[str, bool] = {}

    def run(self, records: Sequence[Record]) -> None:
        asked: dict[tuple[int, ...], Prompt] = {}
        fresh = [record for record in records if record.id not in self.turns]

        def render(prompt: Prompt) -> Rendered:
            row = self.render(prompt)
            asked[row.ids] = prompt
            return row

        def answer(rows: Sequence[Rendered]) -> list[Generation]:
            said = self.engine.generate(
                rows, max_new_tokens=self.max_tokens, stop=partial(decided, thinking=self.thinking)
            )
            for row, one in zip(rows, said, strict=True):
                self.tokens += len(one.ids) + one.finished
                if one.ids:
                    self.turns[row.id].append((asked[row.ids], one.ids))
            return said

        self.turns |= {record.id: [] for record in fresh}
        pairs = [(Arm("agent"), record) for record in fresh]
        for episode in run_pairs(
            pairs, self.make_env, render, answer, max_turns=self.max_turns, thinking=self.thinking
        ):
            self.success[episode.id] = bool(episode.success)


def probe_leaning(model: Any, render: PrefixRenderer, probes: Any, records: Sequence[Record]) -> Cheap:
    """Leaning by a probe: the probability of harm that it reads at the final token, in the middle layer of its own."""
    at = len(probes.layers) // 2
    layer = probes.layers[at]
    w = torch.from_numpy(np.asarray(probes.directions[at], dtype=np.float32))
    b = float(probes.intercepts[at])

    def lean(texts: Sequence[str], tasks: Sequence[int]) -> np.ndarray:
        rows = [render(Arm("", prefix=text).apply(records[i].prompt())) for text in texts for i in tasks]
        found = torch.cat(model.residuals(rows, [layer], where=final())[layer]).float().cpu() @ w + b
        return found.sigmoid().double().view(len(texts), len(tasks)).numpy()

    return lean
