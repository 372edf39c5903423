"""A stand-in model whose answers a test writes down: ``answer(prompt) -> text``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pingscope.interp.chat.rendering import Prompt, Rendered
from pingscope.interp.generate.generation import Generation


class ScriptedModel:
    name = "scripted"
    fingerprint = "f" * 64
    template_hash = "t" * 64
    d_model = 4

    def __init__(self, answer: Callable[[Prompt], str]) -> None:
        self.answer = answer
        self.prompts: list[Prompt] = []
        self.asked: list[list[str]] = []  # ids of each batch

    def render(self, prompt: Prompt, **changes: Any) -> Rendered:
        prompt = replace(prompt, **changes)
        if prompt not in self.prompts:
            self.prompts.append(prompt)
        return Rendered(prompt.id, prompt.label, (self.prompts.index(prompt),), ("header",))

    def check_context(self, rows: Sequence[Rendered], new_tokens: int = 0) -> None:
        """Everything fits."""


@pytest.fixture
def scripted(monkeypatch):
    """Makes a :class:`ScriptedModel` whose answers replace generation in rollouts."""

    def generate(model: ScriptedModel, rows: Sequence[Rendered], **settings: Any) -> list[Generation]:
        model.asked.append([row.id for row in rows])
        return [Generation(row.id, model.answer(model.prompts[row.ids[0]]), (), True) for row in rows]

    class Engine:
        def __init__(self, model: ScriptedModel) -> None:
            self.model = model

        def generate(self, rows: Sequence[Rendered], **settings: Any) -> list[Generation]:
            return generate(self.model, rows)

    monkeypatch.setattr("pingscope.experiments.agents.rollout.generate", generate)
    monkeypatch.setattr("pingscope.experiments.studies.search.prefix_table.SharedPrefill", Engine)
    monkeypatch.setattr("pingscope.experiments.studies.search.prefix_table.PrefixRenderer", lambda model: model.render)
    return ScriptedModel
