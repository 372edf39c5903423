"""Kept keys and values of prompts: the same answers as a full pass, read once, never stale, never over the bound."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model, train_tokenizer

from pingscope.interp import Edit, HookedModel, Prompt
from pingscope.interp.causal.patching import Component, Donor, Patch, patch_components
from pingscope.interp.generate.generation import generate
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.selection import final, parse

pytestmark = pytest.mark.slow


def tiny(family: str = "llama") -> HookedModel:
    tokenizer = train_tokenizer()
    return HookedModel(build_model(family, len(tokenizer)).double(), tokenizer, name=family)


def rows_of(model: HookedModel, prefix: str | None = None, n: int = 6):
    return [model.render(Prompt(f"p{i}", "Buy the laptop " * (1 + 3 * i % 5), prefix=prefix)) for i in range(n)]


class Columns:
    """How many token columns the base model is given."""

    def __init__(self, model: HookedModel) -> None:
        self.seen = 0
        model.base.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs) -> None:
        self.seen += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "mistral"])
def test_arms_say_the_same_with_and_without_the_cache(family):
    model = tiny(family)
    cache = PromptCache(model)
    push = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    edits = [Edit(0, final(), lambda x: x + push), Edit(1, final(), lambda x: x - push)]
    for prefix, changes in ((None, []), ("# Is it safe?", []), (None, edits), ("# Note", edits), (None, [])):
        rows = rows_of(model, prefix)
        plain = generate(model, rows, max_new_tokens=6, edits=changes)
        assert generate(model, rows, max_new_tokens=6, edits=changes, prompts=cache) == plain
        assert generate(model, rows, max_new_tokens=6, edits=changes, prompts=cache, token_budget=60) == plain


def test_a_prompt_is_read_once_for_all_arms():
    model = tiny()
    cache, columns = PromptCache(model), Columns(model)
    rows = rows_of(model)
    generate(model, rows, max_new_tokens=1, prompts=cache)
    assert columns.seen >= sum(len(row) - 1 for row in rows)
    columns.seen = 0
    generate(model, rows, max_new_tokens=1, prompts=cache)
    assert columns.seen == len(rows)  # the last header token of each, whose edit would show in the answer
    columns.seen, longer = 0, rows_of(model, "# Note")
    generate(model, longer, max_new_tokens=1, prompts=cache)
    assert columns.seen == sum(len(a) - len(b) + 1 for a, b in zip(longer, rows, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_patched_decisions_are_the_same_with_and_without_the_cache(family):
    """What a donor gives is its own: a patch near the end of a prompt shares the rest."""
    model, other = tiny(family), tiny(family)
    with torch.no_grad():
        for parameter in other.hf.parameters():
            parameter.mul_(1.3)
    cache, columns = PromptCache(model), Columns(model)
    rows, donor = rows_of(model), Donor(other)
    plain = model.next_token_logits(rows)
    assert torch.equal(model.next_token_logits(rows, prompts=cache).argmax(-1), plain.argmax(-1))
    parts = [Component(0), Component(1, 2), Component(3, 0)]
    for edits in (
        patch_components(donor, parts, final()),
        [Patch(layer=2, where=parse("role:header"), donor=donor)],
        [Patch(layer=2, where=parse("role:instruction"), donor=donor)],
    ):
        wanted = model.next_token_logits(rows, edits)
        for _ in range(2):
            columns.seen = 0
            found = model.next_token_logits(rows, edits, prompts=cache)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(wanted, plain, atol=1e-3)
        shared = all(str(e.where) != "role:instruction" for e in edits)
        assert (columns.seen < sum(map(len, rows)) / 2) is shared
        said = generate(model, rows, max_new_tokens=4, edits=edits)
        assert generate(model, rows, max_new_tokens=4, edits=edits, prompts=cache) == said


def test_an_edit_that_reads_the_prompt_gets_a_full_pass():
    class Reading(Edit):
        """Of a kind that the cache knows nothing of."""

    model = tiny()
    cache, rows = PromptCache(model), rows_of(model)
    assert cache.past(rows, [Edit(0, final(), torch.neg)]) is not None
    assert cache.past(rows, [Reading(0, final(), torch.neg)]) is None


def test_an_edit_inside_the_prompt_is_not_lost():
    model = tiny()
    cache, rows = PromptCache(model), rows_of(model)
    everywhere = [Edit(0, parse("prompt"), lambda x: x * 0.3)]
    middle = [Edit(0, parse("role:instruction"), lambda x: -x)]
    plain = generate(model, rows, max_new_tokens=5, prompts=cache)
    for edits in (everywhere, middle):
        wanted = generate(model, rows, max_new_tokens=5, edits=edits)
        assert generate(model, rows, max_new_tokens=5, edits=edits, prompts=cache) == wanted != plain


def test_a_training_step_makes_what_was_kept_worthless():
    model = tiny()
    cache, rows = PromptCache(model), rows_of(model)
    before = generate(model, rows, max_new_tokens=5, prompts=cache)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.5).add_(0.05)
    after = generate(model, rows, max_new_tokens=5)
    assert generate(model, rows, max_new_tokens=5, prompts=cache) == after != before


def test_prompts_that_do_not_fit_are_read_in_full():
    model = tiny()
    rows = rows_of(model)
    cache = PromptCache(model, max_bytes=100)
    assert cache.past(rows) is None
    assert generate(model, rows, max_new_tokens=4, prompts=cache) == generate(model, rows, max_new_tokens=4)


def test_layers_with_a_window_are_read_in_full():
    model = tiny("mistral")
    assert PromptCache(model).past(rows_of(model)) is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("steered", [False, True])
def test_rows_that_are_done_leave_the_batch(family, steered):
    model, n = tiny(family), 12
    push = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edits = [Edit(0, final(), lambda x: x + push)] if steered else []
    rows = [model.render(Prompt(f"p{i}", "Buy the laptop and the pen " * (i % 3) + str(i))) for i in range(8)]
    free = generate(model, rows, max_new_tokens=n, edits=edits)
    # Of the tokens said, the one that ends the answers at the most different places becomes an end of turns.
    places = {
        token: [answer.ids.index(token) if token in answer.ids else n - 1 for answer in free]
        for token in {token for answer in free for token in answer.ids}
    }
    end = max(places, key=lambda token: (len(set(places[token])), -sum(places[token])))
    assert len(set(places[end])) >= 2
    model.hf.generation_config.eos_token_id = end
    plain, columns = generate(model, rows, max_new_tokens=n, edits=edits), Columns(model)
    cache = PromptCache(model)
    assert generate(model, rows, max_new_tokens=n, edits=edits, prompts=cache) == plain
    assert [len(answer.ids) for answer in plain] == [
        place + (not one.finished) for place, one in zip(places[end], plain, strict=True)
    ]
    columns.seen = 0
    assert generate(model, rows, max_new_tokens=n, edits=edits, prompts=cache) == plain
    assert columns.seen < len(rows) * (1 + max(places[end]))  # a batch that runs to its longest answer computes these
