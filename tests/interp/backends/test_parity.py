"""Batched, padded, hooked = plain single-prompt Hugging Face, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, VISION_LANGUAGE, WINDOW

from pingscope.interp import Edit, Prompt, Rendered, UserError, edit, load_model
from pingscope.interp.backends import BACKENDS, parity
from pingscope.interp.backends.parity import run_parity, sample_prompts, sliding_window
from pingscope.interp.model.check import distance
from pingscope.interp.model.selection import parse

pytestmark = pytest.mark.slow

WORDS = "Buy the laptop for my friend and send the invoice to the office"


def prompts(model) -> list[Rendered]:
    texts = ["Click.", WORDS, WORDS * 4, "Delete her photos in secret", WORDS * 2]
    rows = [model.render(Prompt(f"p{i}", text)) for i, text in enumerate(texts)]
    assert max(map(len, rows)) > 3 * WINDOW > min(map(len, rows))
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", [*FAMILIES, *VISION_LANGUAGE])
def test_every_backend_passes_the_suite(load, family, backend):
    reference = load(family)
    model = load_model(reference, backend=backend)
    checks = run_parity(model, reference, new_tokens=4)
    assert not [check for check in checks if not check.ok]
    names = [check.name for check in checks]
    assert len(names) == len(set(names)) >= 14
    eager = backend == "transformer_lens" or family == "gemma2"  # which has no other kernel
    assert ("residuals, eager attention" in names) != eager
    assert reference.hf.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_suite_has_a_prompt_beyond_the_sliding_window(load, family):
    model = load(family)
    assert sliding_window(model) == WINDOW < max(map(len, sample_prompts(model)))
    assert max(map(len, sample_prompts(model, longest=12))) == 12


def faulty(model, **methods):
    """The model with some of its methods replaced, as a wrong backend would have them."""
    wrong = copy.copy(model)
    for name, method in methods.items():
        setattr(wrong, name, method)
    return wrong


def failed(model, reference):
    return {check.name for check in run_parity(model, reference, new_tokens=4) if not check.ok}


def test_the_suite_finds_missing_positions(load):
    """GPT-2 has learned positions: left padding shifts them unless they are passed."""
    model = load("gpt2")
    inputs = type(model).inputs
    wrong = faulty(model, inputs=lambda batch: {k: v for k, v in inputs(model, batch).items() if k != "position_ids"})
    assert {"residuals, left padding", "logits"} <= failed(wrong, model)
    assert "residuals, right padding" not in failed(wrong, model)


def test_the_suite_finds_a_missing_mask(tiny_model):
    inputs = type(tiny_model).inputs
    # Without positions too: from those alone transformers tells the rows' first tokens.
    wrong = faulty(tiny_model, inputs=lambda batch: {"input_ids": inputs(tiny_model, batch)["input_ids"]})
    assert "residuals, left padding" in failed(wrong, tiny_model)


def test_the_suite_finds_edits_at_the_wrong_tokens(tiny_model):
    shifted = [
        Edit(e.layer, parse("prompt - final"), e.fn) for e in parity.sample_edits(tiny_model, prompts(tiny_model))
    ]
    plain = tiny_model.last_logits, tiny_model.continuations
    wrong = faulty(
        tiny_model,
        last_logits=lambda batch, edits=(), past=None: plain[0](batch, shifted if edits else ()),
        continuations=lambda batch, settings, edits=(), past=None: plain[1](batch, settings, shifted if edits else ()),
    )
    assert "logits, edited" in failed(wrong, tiny_model)
    assert not {"logits", "generation, cache"} & failed(wrong, tiny_model)


def test_the_suite_finds_a_stream_taken_after_the_final_norm(tiny_model):
    """The mistake of reading the last of Hugging Face's hidden states."""
    read = tiny_model.read

    def normed(batch, layers, sink, edits=()):
        read(batch, layers, lambda l, x: sink(l, tiny_model.final_norm(x) if l == 3 else x), edits)

    assert "residuals, right padding" in failed(faulty(tiny_model, read=normed), tiny_model)


def test_batches_cut_by_a_budget_give_the_same(tiny_model):
    rows = prompts(tiny_model)
    whole, cut = (tiny_model.residuals(rows, "embed,all", token_budget=budget) for budget in (16_384, 200))
    assert all(distance(a, b) < 1e-5 for layer in whole for a, b in zip(whole[layer], cut[layer], strict=True))


def test_positions_can_be_chosen(tiny_model):
    rows = prompts(tiny_model)
    whole = tiny_model.residuals(rows, 2)[2]
    kept = tiny_model.residuals(rows, 2, where=parse("at:0 | final"))[2]
    assert all(torch.equal(x[[0, -1]], y) for x, y in zip(whole, kept, strict=True))
    with pytest.raises(UserError, match="matches no token"):
        tiny_model.residuals(rows, 2, where=parse("role:page"))


def test_capture_ends_the_forward_pass_after_the_deepest_layer(tiny_model):
    ran = []
    handle = tiny_model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    try:
        tiny_model.residuals(prompts(tiny_model), "0-1")
        assert not ran
        tiny_model.residuals(prompts(tiny_model), "2")
        assert ran
    finally:
        handle.remove()


def test_residuals_do_not_pin_the_padded_batch(tiny_model):
    found = tiny_model.residuals(prompts(tiny_model), 1)[1]
    for x in found:
        assert x.untyped_storage().nbytes() == x.numel() * 4
        (x.clone().requires_grad_() * 2).sum().backward()  # ordinary tensors, not inference ones


def test_edit_nothing_changes_nothing(tiny_model):
    rows = prompts(tiny_model)
    with edit(tiny_model, rows, []):
        assert torch.equal(tiny_model.next_token_logits(rows), tiny_model.next_token_logits(rows))
