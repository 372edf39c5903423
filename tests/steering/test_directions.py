"""Vector algebra on directions, their files, and the random control."""

from __future__ import annotations

import numpy as np
import pytest

from pingscope.interp.errors import UserError
from pingscope.probes.logistic import LayerProbes
from pingscope.steering import Direction
from pingscope.steering.directions import from_probes, random_like


def direction(seed: int = 0, layers=(0, 2), d: int = 8) -> Direction:
    rng = np.random.default_rng(seed)
    return Direction({layer: rng.standard_normal(d) for layer in layers}, {"seed": seed})


def same(a: Direction, b: Direction) -> bool:
    return a.layers == b.layers and all(np.allclose(a.vectors[layer], b.vectors[layer]) for layer in a.layers)


def test_algebra():
    a, b = direction(0), direction(1)
    assert same(a * 1.5 - b, -(b - 1.5 * a))
    assert same(a + b - b, a)
    assert same(a + a, 2.0 * a)
    assert a.unit().norms() == pytest.approx({0: 1.0, 2: 1.0})
    assert a.cosine(a * 3.0) == pytest.approx({0: 1.0, 2: 1.0})
    assert a.cosine(-a) == pytest.approx({0: -1.0, 2: -1.0})
    assert a.dot(b)[0] == pytest.approx(float(a.vectors[0] @ b.vectors[0]))
    assert a.select([2]).layers == [2]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="differ"):
        direction() + direction(layers=(0, 1))
    with pytest.raises(UserError, match="widths 8 and 4"):
        direction() + direction(d=4)
    with pytest.raises(UserError, match="no layer 5"):
        direction().select([5])
    with pytest.raises(UserError, match="length zero"):
        (direction() * 0.0).unit()
    with pytest.raises(UserError, match="finite"):
        Direction({0: np.array([np.nan, 1.0])})


def test_from_probes_is_the_raw_direction():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    x = rng.standard_normal((40, 8)) + 3 * labels[:, None] * np.eye(8)[0]
    probes = LayerProbes.fit({1: x, 3: x}, labels)
    found = from_probes(probes)
    assert found.layers == [1, 3]
    moved = x + found.vectors[1]
    assert (probes.logits(moved, 1) > probes.logits(x, 1)).all()


def test_random_control_has_the_same_length_and_another_direction():
    a = direction(d=512)
    control = random_like(a, 1)
    assert control.norms() == pytest.approx(a.norms())
    assert all(abs(value) < 0.3 for value in a.cosine(control).values())
    assert same(control, random_like(a, 1))
    assert not same(control, random_like(a, 2))


def test_save_and_load(tmp_path):
    a = direction()
    a.save(tmp_path / "d")
    back = Direction.load(tmp_path / "d")
    assert all((back.vectors[layer] == a.vectors[layer]).all() for layer in a.layers)
    assert back.meta == a.meta


def test_torn_or_foreign_files_are_refused(tmp_path):
    direction(0).save(tmp_path / "a")
    direction(1).save(tmp_path / "b")
    tensors = tmp_path / "a/direction.safetensors"
    tensors.write_bytes((tmp_path / "b/direction.safetensors").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        Direction.load(tmp_path / "a")
    tensors.write_bytes(b"torn")
    with pytest.raises(UserError, match="not a saved direction"):
        Direction.load(tmp_path / "a")
    tensors.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Direction.load(tmp_path / "a")
    with pytest.raises(UserError, match="no such file"):
        Direction.load(tmp_path / "nowhere")


def test_without_leaves_the_part_at_right_angles():
    a, b = direction(0), direction(1)
    rest = a.without(b)
    assert rest.dot(b) == pytest.approx({0: 0.0, 2: 0.0}, abs=1e-12)
    assert same(rest.without(b), rest) and same(a.without(3.0 * b), rest)
    assert a.without(a).norms() == pytest.approx({0: 0.0, 2: 0.0}, abs=1e-12)
