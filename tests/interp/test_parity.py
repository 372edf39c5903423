"""Batched, padded, hooked = plain single-prompt Hugging Face, for every family."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import FAMILIES, WINDOW

from interp import Prompt, Rendered, edit
from interp.generate import generate
from interp.hooks import capture

WORDS = "Buy the laptop for my friend and send the invoice to the office"


def prompts(model) -> list[Rendered]:
    texts = ["Click.", WORDS, WORDS * 4, "Delete her photos in secret", WORDS * 2]
    rows = [model.render(Prompt(f"p{i}", text)) for i, text in enumerate(texts)]
    assert max(map(len, rows)) > 3 * WINDOW > min(map(len, rows))
    return rows


def plain_stream(model, row: Rendered) -> tuple[torch.Tensor, ...]:
    """Hidden states of one unpadded forward pass: embed, block 0 … L-2, final norm of block L-1."""
    with torch.no_grad():
        return model.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    with torch.no_grad():
        return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_equal_single_prompt_runs(load, family):
    model = load(family)
    rows = prompts(model)
    for budget in (16_384, 200):  # one batch, several batches
        found = model.residuals(rows, "embed,all", token_budget=budget)
        assert sorted(found) == [-1, 0, 1, 2, 3]
        for i, row in enumerate(rows):
            plain = plain_stream(model, row)
            for layer in range(-1, model.n_layers - 1):
                assert found[layer][i].shape == (len(row), model.d_model)
                assert distance(found[layer][i], plain[layer + 1][0]) < 1e-5, (family, layer, i)
            # the list's last entry is after the final norm: the hook must be before it
            assert distance(model.final_norm(found[3][i]), plain[-1][0]) < 1e-5
            assert distance(found[3][i], plain[-1][0]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(load, family, side):
    model = load(family)
    rows = prompts(model)
    batch = model.batch(rows, side=side)
    kept: dict[int, torch.Tensor] = {}
    with torch.no_grad(), capture(model, [0, 3], lambda layer, x: kept.update({layer: x.clone()})):
        model.base(**model.inputs(batch))
    for i, row in enumerate(rows):
        for layer in (0, 3):
            alone = model.residuals([row], [layer])[layer][0]
            assert distance(kept[layer][i][batch.mask[i].bool()], alone) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generation_equal_single_prompt_runs(load, family):
    model = load(family)
    rows = prompts(model)
    logits = model.next_token_logits(rows)
    said = generate(model, rows, max_new_tokens=12, token_budget=300)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            alone = model.hf(ids).logits[0, -1]
        assert distance(logits[i], alone) < 1e-5
        plain = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert_same_answer(said[i].ids, said[i].finished, plain[0, len(row) :].tolist(), end=1)


def assert_same_answer(ids: Sequence[int], finished: bool, plain: list[int], end: int) -> None:
    assert finished == (end in plain)
    assert list(ids) == (plain[: plain.index(end)] if end in plain else plain)


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
