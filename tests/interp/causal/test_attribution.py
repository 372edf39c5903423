"""The parts of a readout sum to it, on every family, and ablating a component removes just its part."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES

from pingscope.interp.causal.attribution import attribute, component_names
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import final, parse, prompt

TEXTS = ("Buy the laptop.", "Delete her private photos in secret, then post the password.")


def readouts(model, layers):
    rng = np.random.default_rng(0)
    return {layer: (rng.standard_normal(model.d_model), 0.5 + layer) for layer in layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_heads_sum_to_the_logit_of_every_family(family, load):
    model = load(family)
    rows = [model.render(text) for text in TEXTS]
    wanted = readouts(model, (0, 3))
    for where in (final(), prompt(), parse("role:instruction")):
        found = attribute(model, rows, wanted, where)
        for layer, (w, b) in wanted.items():
            states = model.residuals(rows, [layer])[layer]
            masks = [torch.tensor(where.mask(row)) for row in rows]
            logit = [float((x[m].double() @ torch.tensor(w)).mean()) + b for x, m in zip(states, masks, strict=True)]
            part = found[layer]
            assert part.components == component_names(layer)
            assert part.parts.sum(1) == pytest.approx(np.array(logit), rel=1e-4, abs=1e-4)
            attention = part.parts[:, [part.components.index(f"attention {k}") for k in range(layer + 1)]]
            assert part.heads.sum(2) + part.head_bias == pytest.approx(attention, rel=1e-4, abs=1e-4)
            assert part.heads.shape == (2, layer + 1, 4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_the_last_mlps_part_is_what_removing_it_takes_away(family, load):
    model = load(family)
    rows = [model.render(text) for text in TEXTS]
    wanted = readouts(model, (2,))
    off = Edit(2, final(), torch.zeros_like, "mlp")
    before, after = (model.residuals(rows, [2], edits)[2] for edits in ((), (off,)))
    lost = [float((a[-1] - b[-1]).double() @ torch.tensor(wanted[2][0])) for a, b in zip(before, after, strict=True)]
    part = attribute(model, rows, wanted)[2]
    assert part.parts[:, part.components.index("mlp 2")] == pytest.approx(np.array(lost), rel=1e-4, abs=1e-4)


def test_the_last_layers_head_is_what_removing_it_takes_away(tiny_model):
    rows = [tiny_model.render(text) for text in TEXTS]
    wanted = readouts(tiny_model, (0,))
    size = 16

    def drop(x):
        return torch.cat([x[:, :size], torch.zeros_like(x[:, size : 2 * size]), x[:, 2 * size :]], 1)

    # In a parallel reading of block 0's attention alone: the MLP's answer to it is taken out of both.
    mlp_off = Edit(0, final(), torch.zeros_like, "mlp")
    before = tiny_model.residuals(rows, [0], [mlp_off])[0]
    after = tiny_model.residuals(rows, [0], [mlp_off, Edit(0, final(), drop, "heads")])[0]
    lost = [float((a[-1] - b[-1]).double() @ torch.tensor(wanted[0][0])) for a, b in zip(before, after, strict=True)]
    assert attribute(tiny_model, rows, wanted)[0].heads[:, 0, 1] == pytest.approx(np.array(lost), rel=1e-4, abs=1e-4)


def test_results_do_not_depend_on_the_batch(tiny_model):
    rows = [tiny_model.render(text) for text in (*TEXTS, "Click.", "Open the inbox and the notes.")]
    wanted = readouts(tiny_model, (3,))
    one, many = (attribute(tiny_model, rows, wanted, token_budget=budget)[3] for budget in (1, 4096))
    assert one.parts == pytest.approx(many.parts, rel=1e-5, abs=1e-5)
    assert one.heads == pytest.approx(many.heads, rel=1e-5, abs=1e-5)


def test_a_write_that_is_not_in_the_table_is_an_error_not_a_number(tiny_model):
    hf = copy.deepcopy(tiny_model.hf)
    hf.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.5)
    model = HookedModel(hf, tiny_model.tokenizer)
    with pytest.raises(UserError, match="do not add up"):
        attribute(model, [model.render("Buy it.")], readouts(model, (2,)))


def test_a_readout_that_does_not_fit_is_refused(tiny_model):
    rows = [tiny_model.render("Buy it.")]
    with pytest.raises(UserError, match="does not fit"):
        attribute(tiny_model, rows, {9: (np.ones(tiny_model.d_model), 0.0)})
    with pytest.raises(UserError, match="no token"):
        attribute(tiny_model, rows, readouts(tiny_model, (1,)), parse("role:page"))
