"""Embeddings in place of tokens say what the tokens say, in every family, padded or not, with a cache or without."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, VISION_LANGUAGE, build_model

from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.generate.embedded import check_embedded, embedded_inputs, token_embeddings, with_placeholders
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel

TEXT = "# Note: this could hurt someone.\n"
PROMPTS = [
    Prompt("a", "Buy the laptop for my friend.", page="inbox, notes"),
    Prompt("b", "Delete her photos."),
    Prompt("c", "Post the password of the owner and send the invoice to the office, then stop and think first."),
]


def both(model, prompts=PROMPTS, text=TEXT, **more):
    """Answers behind a text, and behind the embeddings of its tokens."""
    whole = [model.render(prompt, prefix=text) for prompt in prompts]
    bare = [model.render(prompt) for prompt in prompts]
    tails = {row.ids[len(short) :] for row, short in zip(whole, bare, strict=True)}
    (ids,) = tails
    soft = token_embeddings(model, ids).detach().float()
    return generate(model, whole, max_new_tokens=8, **more), generate(model, bare, max_new_tokens=8, soft=soft, **more)


@pytest.mark.parametrize("family", [*FAMILIES, *VISION_LANGUAGE])
def test_a_texts_own_embeddings_are_that_text(family: str, load) -> None:
    model = load(family)
    check_embedded(model)
    expected, found = both(model)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]


def test_bfloat16_weights_and_padded_vocabularies(tokenizer) -> None:
    hf = build_model("gemma3", len(tokenizer) + 56).to(torch.bfloat16)
    expected, found = both(HookedModel(hf, tokenizer))
    # Padding differs between the two runs in nothing, so rounding does not either.
    assert [one.ids for one in found] == [one.ids for one in expected]


def test_embeddings_change_answers_and_one_batch_is_every_batch(tiny_model) -> None:
    soft = torch.randn(3, tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    rows = [tiny_model.render(prompt) for prompt in PROMPTS]
    together = generate(tiny_model, rows, max_new_tokens=8, soft=soft)
    assert together == [generate(tiny_model, [row], max_new_tokens=8, soft=soft)[0] for row in rows]
    assert together != generate(tiny_model, rows, max_new_tokens=8)


def test_gradients_reach_the_embeddings_and_nothing_else(tiny_model) -> None:
    soft = torch.randn(2, tiny_model.d_model).requires_grad_()
    rows = [with_placeholders(tiny_model.render(prompt), 2, tiny_model.pad_id) for prompt in PROMPTS]
    batch = tiny_model.batch(rows, side="left")
    tiny_model.hf(**embedded_inputs(tiny_model, batch, soft)).logits[:, -1].sum().backward(inputs=[soft])
    assert soft.grad is not None and bool((soft.grad.abs().sum(-1) > 0).all())
    assert all(weight.grad is None for weight in tiny_model.hf.parameters())


def test_sampling_behind_embeddings_is_refused(tiny_model) -> None:
    soft = torch.zeros(1, tiny_model.d_model)
    with pytest.raises(UserError, match="soft prefix"):
        generate(tiny_model, [tiny_model.render("x")], temperature=1.0, soft=soft)


def test_a_model_that_reads_embeddings_otherwise_is_refused(tokenizer) -> None:
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    forward = model.hf.forward

    def other(*args, inputs_embeds=None, **more):
        return forward(*args, inputs_embeds=None if inputs_embeds is None else 2 * inputs_embeds**2, **more)

    model.hf.forward = other
    with pytest.raises(UserError, match="otherwise than their tokens"):
        check_embedded(model)
