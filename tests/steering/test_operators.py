"""What each operator does to rows, and that it leaves the others alone, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pingscope.interp.errors import UserError
from pingscope.interp.model.selection import generated
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.directions import Direction
from pingscope.steering.operators import (
    ablate,
    add,
    displaced_along,
    in_logits,
    mirror,
    operator_edits,
    set_logit,
    steering_edits,
    to_boundary,
)

D = 16
W = np.random.default_rng(0).standard_normal(D)
B = -0.5


def rows(dtype=torch.float32, n: int = 64) -> torch.Tensor:
    return (torch.randn(n, D, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)


def logits(x: torch.Tensor) -> torch.Tensor:
    return x.double() @ torch.as_tensor(W) + B


def test_add_and_back():
    x = rows(torch.float64)
    assert torch.allclose(add(-W)(add(W)(x)), x, atol=1e-5)
    assert torch.allclose(add(W)(x) - x, torch.as_tensor(W), atol=1e-5)


def test_ablate_leaves_no_part_and_is_idempotent():
    x = rows()
    once = ablate(W)(x)
    assert torch.allclose(once.double() @ torch.as_tensor(W), torch.zeros(len(x), dtype=torch.float64), atol=1e-4)
    assert torch.allclose(ablate(W)(once), once, atol=1e-5)
    assert torch.allclose(ablate(3 * W)(x), once, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operator", [to_boundary(W, B), to_boundary(W, B, 0.5), set_logit(W, B, 2.0), mirror(W, B)])
def test_rows_beyond_the_boundary_keep_every_bit(operator, dtype):
    x = rows(dtype)
    before = x.clone()
    y = operator(x)
    beyond = logits(x) >= 0
    assert 0 < int(beyond.sum()) < len(x)
    assert torch.equal(y[beyond], x[beyond])
    assert not torch.equal(y[~beyond], x[~beyond])
    assert torch.equal(x, before)
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (to_boundary(W, B), lambda z: 0 * z),
        (to_boundary(W, B, 0.5), lambda z: -0.5 * z),
        (set_logit(W, B, 2.0), lambda z: 0 * z + 2),
        (mirror(W, B), lambda z: -z),
    ],
)
def test_logits_of_the_pushed_rows(operator, expected):
    x = rows(torch.float64)
    z = logits(x)
    assert torch.allclose(logits(operator(x))[z < 0], expected(z[z < 0]), atol=1e-9)
    # The least change that does it: along w alone.
    moved = (operator(x) - x)[z < 0]
    assert torch.allclose(ablate(W)(moved), torch.zeros_like(moved), atol=1e-5)


def test_twice_the_boundary_step_is_the_mirror():
    x = rows(torch.float64)
    assert torch.allclose(to_boundary(W, B, 1.0)(x), mirror(W, B)(x))


def test_doses_are_shares_of_the_residual_norm():
    direction = Direction({0: W, 2: 7 * W})
    edits = steering_edits(direction, [0, 2], dose=0.25, norms={0: 40.0, 2: 80.0})
    assert [(edit.layer, str(edit.where)) for edit in edits] == [(0, "final"), (2, "final")]
    x = rows()
    for edit, norm in zip(edits, (40, 80), strict=True):
        assert torch.allclose((edit.fn(x) - x).norm(dim=1), torch.full((len(x),), 0.25 * norm), rtol=1e-4)
    (edit,) = steering_edits(direction, [2], dose=1.0, norms={2: 1.0}, where=generated(0, 5))
    assert str(edit.where) == "generated[0:5]"


def test_bad_input():
    direction = Direction({0: W})
    with pytest.raises(UserError, match="no layer 3"):
        steering_edits(direction, [3], dose=0.1, norms={3: 1.0})
    with pytest.raises(UserError, match="no residual norm for layer 0"):
        steering_edits(direction, [0], dose=0.1, norms={})
    with pytest.raises(UserError, match="length zero"):
        mirror(np.zeros(D), 0.0)
    with pytest.raises(UserError, match="below the boundary"):
        set_logit(W, B, -1.0)


def test_doses_in_safety_logits():
    direction = Direction({0: W, 2: 7 * W})
    x = rows(torch.float64)
    for edit, w in zip(steering_edits(direction, [0, 2], dose=3.0, norms={}, unit="logit"), (W, 7 * W), strict=True):
        moved = (edit.fn(x) - x) @ torch.as_tensor(w)
        assert torch.allclose(moved, torch.full((len(x),), 3.0, dtype=torch.float64), atol=1e-5)
    # The two units are one dose, converted.
    norms = {0: 40.0, 2: 80.0}
    logits_of = in_logits(direction, [0, 2], dose=0.25, norms=norms)
    for layer in (0, 2):
        (by_norm,) = steering_edits(direction, [layer], dose=0.25, norms=norms)
        (by_logit,) = steering_edits(direction, [layer], dose=logits_of[layer], norms={}, unit="logit")
        assert torch.allclose(by_norm.fn(x), by_logit.fn(x), atol=1e-5)


@pytest.mark.parametrize("operator", [to_boundary(W, B), set_logit(W, B, 2.0), mirror(W, B), ablate(W)])
def test_a_control_moves_every_row_as_far_along_another_direction(operator):
    x, other = rows(torch.float64), np.random.default_rng(1).standard_normal(D)
    moved, control = operator(x) - x, displaced_along(operator, other)(x) - x
    assert torch.allclose(moved.norm(dim=1), control.norm(dim=1), atol=1e-5)
    still = moved.norm(dim=1) == 0
    assert torch.equal(displaced_along(operator, other)(x)[still], x[still])
    unit = torch.as_tensor(other / np.linalg.norm(other))
    assert torch.allclose((control @ unit)[:, None] * unit, control, atol=1e-5)


def test_operators_on_several_layers_read_each_layers_probe():
    probes = LayerProbes((0, 2), np.stack([W, 2 * W]), np.array([B, 1.0]))
    x = rows(torch.float64)
    first, second = operator_edits(probes, "boundary", [0, 2], amount=0.5, where=generated(0, 5))
    assert (first.layer, second.layer, str(first.where)) == (0, 2, "generated[0:5]")
    assert torch.equal(first.fn(x), to_boundary(W, B, 0.5)(x))
    assert torch.equal(second.fn(x), to_boundary(2 * W, 1.0, 0.5)(x))
    other = Direction({0: np.eye(D)[0], 2: np.eye(D)[1]})
    (control,) = operator_edits(probes, "mirror", [2], amount=1.0, control=other)
    assert torch.equal((control.fn(x) - x)[:, 2:], torch.zeros(len(x), D - 2, dtype=torch.float64))
    with pytest.raises(UserError, match="no probe for layer 1"):
        operator_edits(probes, "mirror", [1])
    with pytest.raises(UserError, match="unknown operator 'push'"):
        operator_edits(probes, "push", [0])
