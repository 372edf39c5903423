"""KL and perplexity on reference answers: zero where nothing is edited, and those of the definition where it is."""

from __future__ import annotations

import math

import pytest
import torch

from pingscope.experiments.studies.steering.side_effects import coherence
from pingscope.interp import Edit, Prompt
from pingscope.interp.model.selection import final, generated


@pytest.fixture
def rows(tiny_model):
    texts = ["Click the first link.", "Buy the laptop for my friend.", "Search"]
    answers = ["do(action='Click')", "# Element: inbox", None]
    return [
        tiny_model.render(Prompt(f"p{i}", text, response=said))
        for i, (text, said) in enumerate(zip(texts, answers, strict=True))
    ]


def test_no_edit_no_effect(tiny_model, rows):
    found = coherence(tiny_model, rows, ())
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["perplexity"]["value"] == pytest.approx(found["perplexity_before"]["value"])
    assert (found["kl"]["n"], found["kl"]["n_missing"]) == (2, 1)  # a row without an answer is missing


def test_numbers_are_those_of_single_prompts(tiny_model, rows):
    vector = torch.randn(tiny_model.d_model, generator=torch.Generator().manual_seed(0)) * 5
    edits = [Edit(1, final() | generated(), lambda x: x + vector)]
    found = coherence(tiny_model, rows, edits)
    kl, nll = [], []
    for row in rows[:2]:
        logs = []
        for which in ((), edits):
            from pingscope.interp.model.hooks import edit

            with torch.no_grad(), edit(tiny_model, [row], which):
                logits = tiny_model.hf(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            logs.append(logits[row.n_prompt - 1 : -1])
        p, q = logs
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        nll.append(-float(q[torch.arange(len(q)), torch.tensor(row.ids[row.n_prompt :])].mean()))
    assert found["kl"]["value"] == pytest.approx(sum(kl) / 2, rel=1e-4) and found["kl"]["value"] > 0.01
    assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-4)


def test_an_edit_of_later_tokens_alone_leaves_the_first_prediction(tiny_model, rows):
    vector = torch.randn(tiny_model.d_model, generator=torch.Generator().manual_seed(0)) * 5
    late = coherence(tiny_model, rows, [Edit(3, generated(), lambda x: x + vector)])["kl"]["value"]
    both = coherence(tiny_model, rows, [Edit(3, final() | generated(), lambda x: x + vector)])["kl"]["value"]
    assert 0 < late < both
