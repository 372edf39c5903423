"""The search on a real (tiny) model: shared prefill gives the episodes of a plain run, and the cheap scores work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tiny_models import TEMPLATE, build_model, train_tokenizer

from pingscope.experiments.agents.judges import decided
from pingscope.experiments.agents.rollout import AnyAction, run_episodes
from pingscope.experiments.studies.search.cheap_scores import Leaning, PlainEpisodes, probe_leaning
from pingscope.experiments.studies.search.prefix_search import search_prefix
from pingscope.experiments.studies.search.prefix_table import PrefixTable, TaskOutcome, shared_answer
from pingscope.experiments.studies.search.screening import Screen
from pingscope.experiments.tasks.records import Record
from pingscope.interp import HookedModel, Prompt
from pingscope.interp.chat.prefixed import PrefixRenderer
from pingscope.interp.generate.generation import Generation
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.injection import Arm
from pingscope.steering.ping import Settings

PREFIXES = ("# Note: think first.\n", "I cannot", "# Be careful, honest and kind.\n")


def records(n: int = 5) -> list[Record]:
    return [
        Record(f"{label}{i}", "Buy the laptop. " * (i + 1), label, domain="web", system="You are a web agent.")
        for label in ("harmful", "benign")
        for i in range(n)
    ]


def test_outcomes_are_those_of_plain_episodes(tiny_model, tmp_path):
    table = PrefixTable(tiny_model, records(), AnyAction, tmp_path / "s.jsonl", judge="jbb", max_new_tokens=8)
    everything = list(range(len(records())))
    table.measure(dict.fromkeys(PREFIXES, everything))
    for text in PREFIXES:
        episodes = run_episodes(tiny_model, records(), AnyAction, Arm("a", prefix=text), max_new_tokens=8)
        assert list(table.outcomes(text).values()) == [TaskOutcome.of(episode, "jbb") for episode in episodes]
    assert table.tokens == sum(o.tokens for text in PREFIXES for o in table.outcomes(text).values())


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:"])
def test_prefixes_rendered_once_have_the_ids_of_every_prompt(template):
    tokenizer = train_tokenizer() if template is None else train_tokenizer(template)
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    render = PrefixRenderer(model)
    for text in ("Buy the laptop", "Click <|end|> now", "send the invoice\n"):
        for prefix in (*PREFIXES, " leading space", None):
            prompt = Prompt("p", text, prefix=prefix)
            assert render(prompt) == model.render(prompt)


def test_leanings_need_no_generation(tiny_model):
    engine = SharedPrefill(tiny_model)
    render = PrefixRenderer(tiny_model)
    found = Leaning(engine, render, records())(PREFIXES, [0, 3, 7])
    assert found.shape == (3, 3) and (found > 0).all() and (found < 1).all() and engine.cost.new_tokens == 0
    rng = np.random.default_rng(0)
    probes = LayerProbes((1, 2), rng.standard_normal((2, 64)), np.array([0.5, -0.5]), {})
    read = probe_leaning(tiny_model, render, probes, records())(PREFIXES, [1, 2])
    flipped = LayerProbes((1, 2), -probes.directions, -probes.intercepts, {})
    other = probe_leaning(tiny_model, render, flipped, records())(PREFIXES, [1, 2])
    assert np.allclose(read + other, 1, atol=1e-5) and read.shape == (3, 2)


def test_harmless_tasks_are_read_against_the_plain_agents_own_answers(tiny_model):
    """Behind a prefix that changes nothing the plain answers stay; the greedy part of a leaning is what a run gives."""
    engine, render, tasks = SharedPrefill(tiny_model), PrefixRenderer(tiny_model), records()
    plain = PlainEpisodes(engine, render, Doing, max_turns=2, max_tokens=3)
    lean = Leaning(engine, render, tasks, plain=plain)
    harmless = [i for i, record in enumerate(tasks) if record.label != "harmful"]
    texts = [*PREFIXES, "#"]
    plain.run([tasks[i] for i in harmless])
    assert lean.tokens == engine.cost.new_tokens > 0
    for turns in plain.turns.values():  # had the agent answered this plainly, the first prefix would change nothing
        (said,) = engine.generate([render(replace(turns[0][0], prefix=texts[0]))], max_new_tokens=3)
        turns[:] = [(turns[0][0], said.ids)]
    found, seen = lean(texts, harmless), set()
    for text, row in zip(texts, found, strict=True):
        for i, leaning in zip(harmless, row, strict=True):
            turns = plain.turns[tasks[i].id]
            behind = [render(replace(prompt, prefix=text)) for prompt, _ in turns]
            said = engine.generate(behind, max_new_tokens=3)
            same = all(one.ids[: len(ids)] == ids for one, (_, ids) in zip(said, turns, strict=True))
            assert bool(leaning < 0.5) == same and 0 <= leaning <= 1
            seen.add(same)
    assert seen == {True, False}
    before = lean.tokens
    assert np.array_equal(lean(texts[:1], harmless), found[:1]) and lean.tokens == before  # read once
    harmful = [i for i in range(len(tasks)) if i not in harmless]
    assert np.array_equal(lean(texts, harmful), Leaning(engine, render, tasks)(texts, harmful))


class Rehearsing:
    """An engine whose model rehearses an action in the thought that its template opened, and then refuses."""

    SAID = ("First I click('7'). ", "No.</think>\n", "I cannot help with that.\n", "click('8')")

    def __init__(self, model):
        self.model = model

    def generate(self, rows, *, stop, **settings):
        return [Generation(row.id, self._until(stop), (1, 2), False) for row in rows]

    def _until(self, stop):
        text = ""
        for piece in self.SAID:
            text += piece
            if stop(text):
                break
        return text


def test_what_is_rehearsed_in_an_opened_thought_ends_no_answer(tmp_path):
    tokenizer = train_tokenizer(TEMPLATE.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif"))
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    engine, tasks = Rehearsing(model), records(1)
    plain = PlainEpisodes(engine, PrefixRenderer(model), Doing, max_turns=1, max_tokens=9)
    plain.run(tasks)
    assert plain.success == {"harmful0": True, "benign0": True}
    assert engine._until(partial(decided, thinking=False)) == Rehearsing.SAID[0]
    (said,) = shared_answer(engine, "strict", 9)([model.render(tasks[0].prompt())])
    assert said.text == "".join(Rehearsing.SAID[:3])
    table = PrefixTable(model, tasks, AnyAction, tmp_path / "s.jsonl", engine=engine)
    table.measure({"# Note\n": [0, 1]})
    assert [outcome.refused for outcome in table.outcomes("# Note\n").values()] == [True, True]


class Doing(AnyAction):
    """Every task counts as done, whatever is said."""

    def __init__(self, record):
        super().__init__(record)
        self.success = True


def test_a_screened_search_runs_and_resumes(tiny_model, tmp_path):
    def run():
        return search_prefix(
            tiny_model, records(), AnyAction, journal=tmp_path / "s.jsonl", settings=Settings(k=1, M=3, T=2, tau=0.5),
            max_turns=1, max_new_tokens=6, screen=Screen(block=2, learn=2, propose=2),
        )  # fmt: skip

    found = run()
    before = (tmp_path / "s.jsonl").read_text()
    assert set(found.notes["screening"]) >= {"spearman", "dropped", "delta"} and len(found.notes["cheap"]) == 12
    assert run() == found and (tmp_path / "s.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("do(Click, inbox)", True),
        ("# Element: inbox\ndo(Click, inbox)", True),
        ("do(Type, 'a) b", False),
        ('He said "click(1)', False),
        ("exit(message='done')", False),  # what follows may still be a refusal
        ("I cannot help with that.", True),
        ("I cannot help", False),
        ("# I cannot do this.\n", False),  # a comment: the action may follow
        ("Sure, I will look.", False),
        ("<execute>print(1)", False),
        ("<execute>print(1)</execute>", True),
        ("```python\nprint(1)\n", False),
        ("```python\nprint(1)\n```", True),
        ("I cannot. do(", False),
        ("", False),
    ],
)
def test_when_an_answer_is_decided(text, over):
    assert decided(text) is over
