"""Every decoder-only type of the installed transformers, tiny and random: loads, reads, edits and generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import train_tokenizer
from tiny_types import NO_STREAM, NOT_BUILT, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pingscope.interp import HookedModel, UserError, render
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.check import distance
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import EMBED, parse

TOKENIZER = train_tokenizer()
ROWS = [render(TOKENIZER, text) for text in ("Buy the laptop.", "Click the first link.", "Delete her photos.")]
CLOSE = 1e-4  # of the largest value: another batch sums in another order
NEW = 3

REMEDY = (
    "mend what fails where it is general (interp/model: discovery finds blocks, check proves them, clock counts "
    "positions), give the tiny configuration what it lacks (OWN in tests/tiny_types.py), or name the type with its "
    "reason in NO_STREAM there and in docs/loading.md"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*NO_STREAM}))
def test_a_type_is_read_edited_and_continued(kind):
    try:
        check_type(kind)
    except Exception as error:
        error.add_note(f"{kind}: {REMEDY}")
        raise


@pytest.mark.parametrize("kind", NO_STREAM)
def test_a_type_without_a_stream_is_refused_with_its_reason(kind):
    assert kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, f"{kind}: gone from transformers; strike it from NO_STREAM"
    if kind in NOT_BUILT:
        with pytest.raises(NOT_BUILT[kind]):  # if not: strike it from NOT_BUILT, and see what comes of it here
            tiny_model(kind, len(TOKENIZER))
        return
    hf = tiny_model(kind, len(TOKENIZER))
    with pytest.raises(UserError) as refused:  # if not: strike it from NO_STREAM and from docs/loading.md
        HookedModel(hf, TOKENIZER)
    assert "\n" not in str(refused.value)


def test_the_documentation_lists_them():
    """docs/loading.md says how many types work, and names the others as the table does."""
    text = " ".join((Path(__file__).parents[3] / "docs/loading.md").read_text().split())
    works = len({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*NO_STREAM})
    assert f"{works} of the {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} types" in text
    for reason in dict.fromkeys(NO_STREAM.values()):
        kinds = ", ".join(f"`{kind}`" for kind, why in NO_STREAM.items() if why == reason)
        assert f"| {kinds} | {reason} |" in text


def check_type(kind: str) -> None:
    """What the toolkit promises of a model, held against plain runs of one prompt each."""
    hf = tiny_model(kind, len(TOKENIZER))
    model = HookedModel(hf, TOKENIZER)
    with torch.no_grad():
        plain = [hf(input_ids=torch.tensor([row.ids]), use_cache=False, output_hidden_states=True) for row in ROWS]
    check_stream(model, plain)
    check_edits_reach_logits(model, [out.logits[0, -1] for out in plain])
    check_generation(model)


def check_stream(model: HookedModel, plain: list) -> None:
    """Read in one padded batch, it is the model's own hidden states; hooks leave the pass bit-equal."""
    found = model.residuals(ROWS, "embed,all")
    for i, out in enumerate(plain):
        states = [model.beside(x)[0] for x in out.hidden_states or ()]
        if model.first_state is not None:
            for layer, x in enumerate(states[:-1], model.first_state):  # the last comes after the final norm
                assert distance(found[layer][i], x) < CLOSE, layer
    calls = []
    handles = [model.on_residual(layer, lambda x: calls.append(0)) for layer in range(EMBED, model.n_layers)]
    with torch.no_grad():
        again = model.hf(input_ids=torch.tensor([ROWS[0].ids]), use_cache=False)
    [handle.remove() for handle in handles]
    assert torch.equal(again.logits, plain[0].logits) and len(calls) == model.n_layers + 1


def check_edits_reach_logits(model: HookedModel, plain: list[torch.Tensor]) -> None:
    """A batch's logits are those of single rows, with edits that do nothing too; every other edit moves them."""
    alone = torch.stack(plain)[:, : model.vocab_size]
    nothing = [Edit(layer, parse("final"), torch.clone) for layer in range(EMBED, model.n_layers)]
    for edits in ((), nothing):
        assert distance(model.next_token_logits(ROWS, edits), alone) < CLOSE
    for change in (torch.zeros_like, lambda x: x + x.std(-1, keepdim=True) * torch.randn(x.shape[-1])):
        moved = model.next_token_logits(ROWS, [Edit(model.n_layers // 2, parse("final"), change)])
        assert bool(((moved - alone).abs().amax(-1) > 1e-3 * alone.abs().max()).all())


def check_generation(model: HookedModel) -> None:
    """A batch says what single rows say and what runs without a cache say, edited or not."""
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    steer = Edit(model.n_layers // 2, parse("final | generated[0:]"), lambda x: x + x.std(-1, keepdim=True) * vector)
    for edits in ((), (steer,)):
        said = [g.ids for g in generate(model, ROWS, max_new_tokens=NEW, edits=edits)]
        assert said == [g.ids for g in generate(model, ROWS, max_new_tokens=NEW, edits=edits, use_cache=False)]
        assert said[0] == generate(model, ROWS[:1], max_new_tokens=NEW, edits=edits)[0].ids
