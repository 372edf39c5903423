from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pingscope.experiments.studies.tracking.noise_floor import Floor, changed, floor_models, random_weights
from pingscope.experiments.studies.tracking.tracking import final_gap, fit_probes, residual_norms, track
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.selection import final
from pingscope.probes import LayerProbes
from pingscope.steering.injection import Arm

pytestmark = pytest.mark.slow

WORDS = "buy laptop friend invoice office notes page inbox click link list items".split()
ARMS = [
    Arm("base", "base"),
    Arm("agent", "agent"),
    Arm("agent+prefix", "agent", prefix="# Note: stop"),
]


def records(n: int, labels: tuple[str, ...], name: str, page: str = "") -> list[Record]:
    rng = np.random.default_rng(len(name))
    found = []
    for i in range(n):
        label = labels[i % len(labels)]
        words = [*rng.choice(WORDS, 5), "password" if label == "harmful" else "settings"]
        found.append(Record(f"{name}{i}", " ".join(words), label, context=page, pair_id=f"{name}{i // len(labels)}"))
    return found


CHAT = records(30, ("harmful", "benign"), "chat")
TASKS = records(24, ("harmful", "benign", "lookalike"), "task", page="The page shows a list of items.")


@pytest.fixture(scope="module")
def models(tiny_model):
    hf = copy.deepcopy(tiny_model.hf)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return {"base": tiny_model, "agent": HookedModel(hf, tiny_model.tokenizer, name="agent")}


def fitted_and_tracked(models, arms, folder, layers, floor, examples):
    table = fit_probes(models, CHAT, folder, layers=layers)
    probes = LayerProbes.load(folder / "probes" / "base-mean_prompt")
    return {"probes": table} | track(models, arms, CHAT, TASKS, folder, probes, floor=floor, examples=examples)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    return folder, fitted_and_tracked(models, ARMS, folder, [-1, 3], 3, 4)


def estimates(value):
    if isinstance(value, dict) and set(value) == {"value", "ci", "n", "n_missing"}:
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from estimates(item)


def test_the_sections_have_the_shape_of_results_json(run) -> None:
    _, found = run
    json.dumps(found, allow_nan=False)
    assert set(found) == {
        "probes", "baselines", "tracks", "curves", "tokens", "collapse", "collapse_claims", "floor",
    }  # fmt: skip
    assert set(found["probes"]) == {"base", "agent"}
    assert set(found["probes"]["base"]) == {"mean_prompt", "mean_instruction", "final"}
    row = found["probes"]["agent"]["mean_instruction"]["3"]
    assert set(row) >= {"auroc", "accuracy", "tpr_at_1fpr", "shuffled_auroc", "random_auroc", "transfer_auroc"}
    assert found["baselines"]["chat"]["words_auroc"]["value"] == 1
    for section in ("tracks", "curves", "collapse"):
        assert list(found[section]) == [arm.name for arm in ARMS]
        assert list(found[section]["agent"]) == ["embed", "3"]
    assert {"instruction", "page", "template", "header", "prompt", "final"} == set(
        found["tracks"]["agent"]["3"]["lookalike"]
    )
    assert "prefix" in found["tracks"]["agent+prefix"]["3"]["harmful"]
    readings = found["collapse"]["agent"]["3"]
    assert set(readings) == {
        "raw", "contrast", "shift", "placed", "realigned", "floor", "controls", "verdict",
    }  # fmt: skip
    assert set(readings["controls"]) == {"random_weights", "shuffled_labels"}
    assert all(0 < e["n"] <= 100 for e in estimates(found["collapse"]))
    assert found["floor"]["n"] == 3 or found["floor"]["n"] + found["floor"]["rejected"] == 6
    assert readings["floor"]["contrast"]["final"]["gap"]["n"] == found["floor"]["n"]
    claims = {row["id"]: row for row in found["collapse_claims"]}
    assert set(claims) >= {"collapse-contrast", "collapse-realigned", "signal-restored"}
    share = claims["signal-restored"]["evidence"]["share restored, agent+prefix"]
    lost = found["collapse"]["agent"]["3"]["contrast"]["final"]["gap_shrink"]["value"]
    left = found["collapse"]["agent+prefix"]["3"]["contrast"]["final"]["gap_shrink"]["value"]
    layer = found["collapse"]["agent+prefix"]["3"]["contrast"]["final"]["gap_restored"]
    assert (layer["value"] is None) == (lost <= 0)
    if lost > 0:
        assert layer["value"] == pytest.approx((lost - left) / lost, rel=1e-4)
    assert (claims["signal-restored"]["holds"] is None) == (share["value"] is None)


def test_readings_agree_with_tracks_and_with_the_files(run) -> None:
    folder, found = run
    for arm in found["tracks"]:
        for label in ("harmful", "benign"):
            for position in ("final", "prompt", "instruction"):
                track_value = found["tracks"][arm]["3"][label][position]["value"]
                assert found["collapse"][arm]["3"]["raw"][position][label]["value"] == pytest.approx(track_value)
    table = pq.read_table(folder / "tracks.parquet").to_pylist()
    own = [row["logit"] for row in table if (row["arm"], row["layer"], row["label"], row["role"])
           == ("agent", 3, "harmful", "final")]  # fmt: skip
    assert len(own) == 8
    assert np.mean(own) == pytest.approx(found["tracks"]["agent"]["3"]["harmful"]["final"]["value"])
    assert LayerProbes.load(folder / "probes" / "base-mean_prompt").layers == (-1, 3)
    shown = [row for row in found["tokens"] if row["arm"] == "agent+prefix"]
    assert len(shown) == 4 and {row["label"] for row in shown} == {"harmful", "benign", "lookalike"}
    assert all(len(row["tokens"]) == len(row["roles"]) == len(row["logits"]["3"]) for row in shown)


def test_an_injection_after_the_prompt_leaves_the_prompt_alone(run) -> None:
    _, found = run
    plain, prefixed = (found["collapse"][arm]["3"] for arm in ("agent", "agent+prefix"))
    for label in ("harmful", "benign", "lookalike"):
        before, after = plain["raw"]["prompt"][label]["value"], prefixed["raw"]["prompt"][label]["value"]
        assert before == pytest.approx(after, abs=1e-4)
        moved = plain["raw"]["final"][label]["value"], prefixed["raw"]["final"][label]["value"]
        assert abs(moved[0] - moved[1]) > 1e-3


def test_the_reference_compared_with_itself_is_zero(run) -> None:
    _, found = run
    for layer in found["collapse"]["base"].values():
        for entry in estimates(layer["shift"]):
            assert entry["value"] == 0 and entry["ci"] == [0, 0]
        assert {row["verdict"] for row in layer["verdict"].values()} == {"absent"}


def test_a_second_run_finds_its_stores_and_gives_the_same(run, models, monkeypatch) -> None:
    folder, found = run
    monkeypatch.setattr("pingscope.interp.store.extraction._Run.chunk", lambda *a, **k: pytest.fail("computed again"))
    assert fitted_and_tracked(models, ARMS, folder, [-1, 3], 3, 4) == found


def test_identical_models_show_no_collapse_and_one_model_is_enough(models, tmp_path) -> None:
    arms = [Arm("base", "base"), replace(ARMS[1], name="twin", model="base")]
    found = fitted_and_tracked({"base": models["base"]}, arms, tmp_path, "3", 0, 1)
    assert "transfer_auroc" not in found["probes"]["base"]["final"]["3"]
    twin = found["collapse"]["twin"]["3"]
    assert all(entry["value"] == 0 for entry in estimates(twin["shift"]))
    assert twin["contrast"]["final"]["gap_shrink"]["value"] in (0, None)
    assert {row["verdict"] for row in twin["verdict"].values()} == {"absent"}
    assert found["collapse_claims"] == [] and found["floor"] == {"n": 0, "rejected": 0, "updates": []}


def test_floor_updates_are_small_seeded_and_leave_the_model_alone(models) -> None:
    model = models["base"]
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    texts = [Prompt(f"c{i}", "click the first link", response="done") for i in range(4)]
    rows = [model.render("buy the laptop"), model.render("click the link")]
    reference = model.next_token_logits(rows)
    moved = {}
    for i, update in enumerate(floor_models(model, texts, 4, seed=3)):
        moved[i] = (update.kind, changed(reference, update.model.next_token_logits(rows)))
    assert [kind for kind, _ in moved.values()] == ["bfloat16", "reload", "chat", "chat"]
    assert moved[1][1] == (0.0, 0.0)
    assert all(kl < 0.2 for _, (kl, _) in moved.values()) and moved[2][1][0] > 0
    again = [changed(reference, u.model.next_token_logits(rows)) for u in floor_models(model, texts, 3, seed=3)]
    assert again[2] == moved[2][1]
    assert all(torch.equal(before[name], value) for name, value in model.hf.state_dict().items())
    untrained = random_weights(model)
    assert untrained.n_layers == model.n_layers and untrained.fingerprint != model.fingerprint


def test_an_update_that_changed_behaviour_is_replaced_by_another(models, monkeypatch) -> None:
    model = models["base"]
    rows = [model.render(task.prompt()) for task in TASKS[:2]]
    texts = [Prompt(f"c{i}", "click the first link", response="done") for i in range(4)]
    shares = iter([0.0, 0.2, 0.0, 0.2, 0.2, 0.05, 0.0])
    monkeypatch.setattr(
        "pingscope.experiments.studies.tracking.noise_floor.changed", lambda before, after: (0.0, next(shares))
    )
    floor = Floor(model, rows, texts, 3, [3], 0)
    assert len(list(floor.updates())) == 3
    assert (floor.summary()["n"], floor.summary()["rejected"]) == (3, 3)  # the sixth completes the floor
    monkeypatch.setattr("pingscope.experiments.studies.tracking.noise_floor.changed", lambda before, after: (1.0, 1.0))
    hopeless = Floor(model, rows, texts, 2, [3], 0)
    assert list(hopeless.updates()) == [] and hopeless.summary()["rejected"] == 4


def test_gap_and_norms_at_the_final_token(run, models) -> None:
    folder, found = run
    probes = LayerProbes.load(folder / "probes" / "base-mean_prompt")
    gaps = final_gap(models["agent"], TASKS, probes)
    wanted = found["collapse"]["agent"]["3"]["contrast"]["final"]["gap"]["value"]
    assert gaps["3"]["value"] == pytest.approx(wanted, abs=1e-4)
    row = models["agent"].render(TASKS[0].prompt())
    state = models["agent"].residuals([row], [2])[2][0][row.final]
    assert residual_norms(models["agent"], TASKS[:1], [2]) == {2: pytest.approx(float(state.norm()), rel=1e-5)}


def test_arms_with_edits_are_refused_by_name(run, models, tmp_path) -> None:
    from pingscope.interp.model.hooks import Edit

    steered = Arm("agent+steer", "agent", edits=(Edit(1, final(), lambda x: x),))
    with pytest.raises(UserError, match=r"agent\+steer"):
        probes = LayerProbes.load(run[0] / "probes" / "base-mean_prompt")
        track(models, [ARMS[0], steered], CHAT, TASKS, tmp_path, probes)
