from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pingscope.interp.errors import UserError
from pingscope.probes import LayerProbes
from pingscope.probes.logistic import ProbeConvergenceWarning, folds


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 12)) * np.logspace(-2, 2, 12) + 50  # badly scaled and far from the origin
    y = (x[:, 3] + x[:, 4] > np.median(x[:, 3] + x[:, 4])).astype(int)
    return x, y


@pytest.mark.parametrize("width", [12, 300])
def test_raw_space_logits_equal_the_pipeline(data, width) -> None:
    x, y = data
    x = np.concatenate([x, np.random.default_rng(1).standard_normal((200, width - 12))], 1)
    found = LayerProbes.fit({4: x}, y, C=0.5)
    solver = "newton-cholesky" if width < 256 else "lbfgs"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-6, max_iter=2000, solver=solver))
    wanted = model.fit(x, y).decision_function(x)
    assert np.abs(found.logits(x, 4) - wanted).max() < 1e-8 * np.abs(wanted).max()
    assert (wanted > 0).mean() == pytest.approx(0.5, abs=0.1)


def test_labels_by_name_and_the_sign_is_harmful(data) -> None:
    x, y = data
    names = np.where(y == 1, "harmful", np.where(np.arange(200) % 2, "benign", "lookalike"))
    named, numbered = LayerProbes.fit({0: x}, list(names)), LayerProbes.fit({0: x}, y)
    np.testing.assert_array_equal(named.directions, numbered.directions)
    z = named.logits(x, 0)
    assert z[y == 1].mean() > 0 > z[y == 0].mean()


def test_torch_and_numpy_any_leading_shape(data) -> None:
    x, y = data
    probes = LayerProbes.fit({0: x, 1: x + 1}, y)
    cube = torch.tensor(x[:60]).reshape(3, 4, 5, 12)
    found = probes.logits(cube, 1)
    assert isinstance(found, torch.Tensor) and found.shape == (3, 4, 5)
    np.testing.assert_allclose(found.flatten().numpy(), probes.logits(x[:60], 1), rtol=1e-12)
    assert probes.logits(cube.to(torch.bfloat16), 1).dtype == torch.float64
    assert probes.logits(x[0], 1).shape == ()


def test_constant_features_weigh_nothing(data) -> None:
    x, y = data
    x[:, 5] = 3.7
    probes = LayerProbes.fit({0: x}, y)
    assert probes.directions[0, 5] == 0
    moved = x.copy()
    moved[:, 5] = -1e6
    np.testing.assert_array_equal(probes.logits(moved, 0), probes.logits(x, 0))
    same = LayerProbes.fit({0: np.ones((200, 3))}, y)  # the embedding of one template token
    assert not same.directions.any() and np.isfinite(same.intercepts).all()


def test_save_and_load(data, tmp_path) -> None:
    x, y = data
    probes = LayerProbes.fit({-1: x, 3: x**2}, y, meta={"pooling": "final", "model": "toy"})
    probes.save(tmp_path / "p")
    again = LayerProbes.load(tmp_path / "p")
    assert again.layers == (-1, 3) and again.meta == probes.meta and again.meta["pooling"] == "final"
    np.testing.assert_array_equal(again.logits(x, 3), probes.logits(x, 3))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["probes.json", "probes.safetensors"]


def test_torn_or_foreign_files_are_refused(data, tmp_path) -> None:
    x, y = data
    LayerProbes.fit({0: x}, y).save(tmp_path / "a")
    LayerProbes.fit({0: x}, y, C=1.0).save(tmp_path / "b")
    (tmp_path / "a" / "probes.safetensors").write_bytes((tmp_path / "b" / "probes.safetensors").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        LayerProbes.load(tmp_path / "a")
    (tmp_path / "b" / "probes.json").write_text(json.dumps({"layers": [0]}))
    with pytest.raises(UserError, match=r"probes\.json: field format is missing"):
        LayerProbes.load(tmp_path / "b")
    with pytest.raises(UserError, match="no such file"):
        LayerProbes.load(tmp_path / "nowhere")


def test_c_by_grouped_cross_validation_prefers_strong_shrinkage_on_noise() -> None:
    rng = np.random.default_rng(0)
    noise, y = rng.standard_normal((80, 60)), np.arange(80) % 2
    found = LayerProbes.fit({0: noise}, y, groups=list(np.arange(80) // 2), C="cv")
    assert found.meta["C"] == {"0": 0.001}
    signal = noise.copy()
    signal[:, 0] += 8 * y
    assert LayerProbes.fit({0: signal}, y, C="cv").meta["C"]["0"] > 0.001


def test_a_fit_that_stops_early_says_so(data, monkeypatch) -> None:
    x, y = data
    monkeypatch.setattr("pingscope.probes.logistic._ITERATIONS", 1)
    with pytest.warns(ProbeConvergenceWarning, match="layer 0"):
        assert LayerProbes.fit({0: x}, y, C=10.0).meta["converged"] == {"0": False}


def test_folds_keep_groups_whole_and_both_classes() -> None:
    positive = np.arange(60) % 2 == 0
    groups = np.arange(60) // 4
    split = folds(positive, groups, 5, 0)
    assert len(split) == 5 and sorted(np.concatenate([test for _, test in split])) == list(range(60))
    for train, test in split:
        assert not set(groups[train]) & set(groups[test])
        assert 0 < positive[train].sum() < len(train)
    assert folds(positive, np.zeros(60, int), 5, 0) == []


def test_wrong_input_is_refused(data) -> None:
    x, y = data
    with pytest.raises(UserError, match="one of the two is missing"):
        LayerProbes.fit({0: x}, np.ones(200, int))
    with pytest.raises(UserError, match="not finite"):
        LayerProbes.fit({0: np.where(x == x[3, 3], np.nan, x)}, y)
    with pytest.raises(UserError, match="label 'evil'"):
        LayerProbes.fit({0: x}, ["evil"] * 200)
    probes = LayerProbes.fit({0: x}, y)
    with pytest.raises(UserError, match="no layer 7"):
        probes.logits(x, 7)
    with pytest.raises(UserError, match="11 wide, the probe 12"):
        probes.logits(x[:, :11], 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": "0"}, "field layers"),
        ({"layers": [0, 0]}, "do not belong|distinct"),
        ({"layers": [-7]}, "field layers"),
        ({"meta": None}, "field meta"),
        ({"sha256": 7}, "field sha256"),
        ({"format": 2}, "format 2"),
        ({"speed": 2}, "field speed is unknown"),
    ],
)
def test_broken_records_are_refused_by_field(data, tmp_path, change, said) -> None:
    x, y = data
    LayerProbes.fit({0: x}, y).save(tmp_path)
    record = tmp_path / "probes.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        LayerProbes.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_probes_that_are_not_finite_are_refused(data, tmp_path) -> None:
    from safetensors.numpy import save as save_arrays

    from pingscope.interp.files import sha256_of

    with pytest.raises(UserError, match="layer 0 is not finite"):
        LayerProbes((0,), np.array([[1.0, np.nan]]), np.zeros(1))
    with pytest.raises(UserError, match="1 layers, but directions"):
        LayerProbes((0,), np.ones((2, 3)), np.zeros(2))
    x, y = data
    LayerProbes.fit({0: x}, y).save(tmp_path)
    raw = save_arrays({"directions": np.full((1, x.shape[1]), np.nan), "intercepts": np.zeros(1)})
    (tmp_path / "probes.safetensors").write_bytes(raw)
    record = json.loads((tmp_path / "probes.json").read_text())
    (tmp_path / "probes.json").write_text(json.dumps(record | {"sha256": sha256_of(raw)}))
    with pytest.raises(UserError, match="layer 0 is not finite"):
        LayerProbes.load(tmp_path)
