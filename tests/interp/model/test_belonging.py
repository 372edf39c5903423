"""Artefacts belong to the model they were made on."""

from __future__ import annotations

import numpy as np
import pytest

from pingscope.interp import UserError, load_model
from pingscope.interp.model.belonging import check_belongs, origin, transfer_note
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.directions import from_probes


@pytest.fixture(scope="module")
def probes(tiny_model):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 64)), np.arange(20) % 2
    return LayerProbes.fit({1: x, 3: x + 1}, y, meta=origin(tiny_model))


def test_probes_are_read_on_their_own_model(probes, tiny_model, tmp_path):
    probes.save(tmp_path)
    found = LayerProbes.load(tmp_path).check_model(tiny_model, path=tmp_path)
    assert found["transfer"] is False and transfer_note(found) == ""
    assert found["fitted_on"] == found["read_on"] == tiny_model.fingerprint


def test_another_model_is_refused_unless_the_transfer_is_asked_for(probes, tiny_model, load):
    other = load("mistral")  # of the same width and depth
    with pytest.raises(UserError, match=r"p: probes were fitted on .*llama.*--transfer"):
        probes.check_model(other, path="p")
    found = probes.check_model(other, transfer=True, path="p")
    assert found["transfer"] is True and tiny_model.fingerprint[:12] in transfer_note(found)
    with pytest.raises(UserError, match="direction were fitted on"):
        check_belongs(from_probes(probes).meta, other, what="direction")
    assert check_belongs(from_probes(probes).meta, tiny_model, what="direction")["transfer"] is False


def test_sums_of_directions_keep_their_model(probes, tiny_model, load):
    direction = from_probes(probes)
    other = from_probes(LayerProbes(probes.layers, probes.directions, probes.intercepts, origin(load("mistral"))))
    for one in (direction + direction, -direction, direction.unit(), direction.without(2.0 * direction)):
        assert one.meta["fingerprint"] == tiny_model.fingerprint
    assert "fingerprint" not in (direction - other).meta


def test_another_width_depth_or_convention_is_refused_even_for_a_transfer(probes, tiny_model):
    narrow = LayerProbes((0,), np.ones((1, 8)), np.zeros(1))
    deep = LayerProbes((7,), np.ones((1, 64)), np.zeros(1))
    for wrong in (narrow, deep):
        with pytest.raises(UserError, match="d_model 64 and 4 layers"):
            wrong.check_model(tiny_model, transfer=True)
    for change, said in (({"n_layers": 9}, "n_layers 9"), ({"layer_convention": "embed is 0"}, "count layers")):
        with pytest.raises(UserError, match=said):
            check_belongs(probes.meta | change, tiny_model, transfer=True)


def test_another_template_is_refused(probes, tiny_model):
    other = load_model(tiny_model.name, chat_template=tiny_model.tokenizer.chat_template + "{# other #}")
    with pytest.raises(UserError, match="chat template"):
        probes.check_model(other)
    assert probes.check_model(other, transfer=True)["transfer"] is False


def test_probes_that_do_not_say_where_they_are_from(tiny_model):
    found = LayerProbes((0,), np.ones((1, 64)), np.zeros(1)).check_model(tiny_model, path="mine")
    assert found["transfer"] is None and "do not say" in transfer_note(found)
