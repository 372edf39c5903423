"""Patching: whole states make a model the other one, nothing else moves, and order and batching do not matter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pingscope.interp.causal.patching import (
    Component,
    Donor,
    Patch,
    all_components,
    check_pair,
    estimate_effects,
    patch_components,
)
from pingscope.interp.errors import UserError
from pingscope.interp.generate import generation as generation
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import EMBED, final, parse, prompt

TEXTS = ("Buy the laptop.", "Delete her private photos in secret, then post the password.", "Open it.", "Click a link.")


def other_of(model, size=0.05, seed=1):
    hf = copy.deepcopy(model.hf)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return HookedModel(hf, model.tokenizer, name="other")


@pytest.fixture(scope="module")
def pair(tiny_model):
    return tiny_model, other_of(tiny_model)


@pytest.fixture(scope="module")
def rows(tiny_model):
    return [tiny_model.render(text, system="Be kind.") for text in TEXTS]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_all_of_the_last_layer_makes_the_agent_say_what_the_base_says_there(family, load):
    base = load(family)
    agent = other_of(base)
    rows = [agent.render(text) for text in TEXTS]
    patch = Patch(layer=3, where=prompt(), donor=Donor(base))
    patched = agent.residuals(rows, [3], [patch])[3]
    for one, two in zip(patched, base.residuals(rows, [3])[3], strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_only_the_selected_role_changes(pair, rows):
    base, agent = pair
    where = parse("role:instruction")
    patched = agent.residuals(rows, [1], [Patch(layer=1, where=where, donor=Donor(base))])[1]
    plain, wanted = agent.residuals(rows, [1])[1], base.residuals(rows, [1])[1]
    for i, row in enumerate(rows):
        here = torch.tensor(where.mask(row))
        assert torch.allclose(patched[i][here], wanted[i][here], atol=1e-5)
        assert torch.equal(patched[i][~here], plain[i][~here])


def test_patching_a_model_with_its_own_states_changes_nothing(pair, rows):
    _, agent = pair
    before = agent.next_token_logits(rows)
    patches = [Patch(layer=EMBED, where=prompt(), donor=Donor(agent))]
    patches += patch_components(Donor(agent), all_components(agent), final())
    assert torch.allclose(agent.next_token_logits(rows, patches), before, atol=1e-4)


def test_batching_does_not_mix_prompts_up(pair, rows):
    base, agent = pair
    patches = [*patch_components(Donor(base), [Component(1, 0), Component(2, 3), Component(3)], prompt())]
    together = agent.next_token_logits(rows, patches)
    for i, row in enumerate(rows):
        alone = agent.next_token_logits([row], patches)
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    assert torch.allclose(agent.next_token_logits(rows[::-1], patches).flip(0), together, atol=1e-4)


def test_generation_under_a_patch_starts_from_the_patched_state(pair, rows):
    base, agent = pair
    patches = [Patch(layer=3, where=prompt(), donor=Donor(base))]
    said = generation.generate(agent, rows, max_new_tokens=3, edits=patches)
    firsts = agent.next_token_logits(rows, patches).argmax(-1).tolist()
    assert [g.ids[0] if g.ids else None for g in said] == [f if f != 1 else None for f in firsts]


def test_heads_not_named_keep_their_own_values(pair, rows):
    base, agent = pair
    seen = []

    def look(x):
        seen.append(x.clone())
        return x

    chosen = Patch(layer=2, where=final(), part="heads", donor=Donor(base), heads=(1, 3))
    agent.next_token_logits(rows[:1], [Edit(2, final(), look, "heads")])
    agent.next_token_logits(rows[:1], [chosen, Edit(2, final(), look, "heads")])
    plain, patched = (x.reshape(4, -1) for x in seen)
    theirs = Donor(base).states(rows[:1], final(), (2, "heads"))[0].reshape(4, -1)
    assert torch.equal(patched[[0, 2]], plain[[0, 2]])
    assert torch.allclose(patched[[1, 3]], theirs[[1, 3]])


def test_a_partner_lends_the_token_at_the_same_fraction(pair, rows):
    base, _ = pair
    where = parse("role:instruction")
    donor = Donor(base, partner=lambda row: rows[1], name="other prompt")
    theirs = base.residuals(rows[1:2], [0])[0][0][torch.tensor(where.mask(rows[1]))]
    lent = donor.states(rows[:1], where, (0, "residual"))[0]
    assert len(lent) == sum(where.mask(rows[0])) < len(theirs)
    assert torch.allclose(lent[0], theirs[0], atol=1e-5) and torch.allclose(lent[-1], theirs[-1], atol=1e-5)


def test_estimated_effects_are_the_slope_of_the_measured_ones(tiny_model, rows):
    """For a model that is nearly the same, patching one component moves the metric by the estimate."""
    near = other_of(tiny_model, size=1e-4)

    def metric(logits):
        return logits[:, 7] - logits[:, 9]

    estimated = estimate_effects(near, Donor(tiny_model), rows, final(), metric)
    plain = metric(near.next_token_logits(rows))
    assert set(estimated) == set(all_components(near)) and len(estimated) == 20
    for component in (Component(0, 1), Component(2, 0), Component(1), Component(3)):
        patched = metric(near.next_token_logits(rows, patch_components(Donor(tiny_model), [component], final())))
        measured = (patched - plain).numpy()
        assert estimated[component] == pytest.approx(measured, rel=0.1, abs=1e-5)
    assert max(np.abs(values).max() for values in estimated.values()) > 1e-4


def test_two_architectures_cannot_be_patched(load):
    with pytest.raises(UserError, match="one architecture"):
        check_pair(load("llama"), HookedModel(_narrow(load("llama")), load("llama").tokenizer))


def _narrow(model):
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.hf.config)
    config.num_hidden_layers = 2
    return AutoModelForCausalLM.from_config(config)


def test_an_unbound_patch_is_refused(pair):
    with pytest.raises(UserError, match="depends on the prompts"):
        Patch(layer=0, where=final(), donor=Donor(pair[0])).fn(torch.zeros(1, 64))
