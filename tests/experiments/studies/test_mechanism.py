"""The mechanism on a planted fault: an agent that is its base but for one MLP must be found out by every study."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pingscope.experiments.agents.rollout import AnyAction
from pingscope.experiments.studies.mechanism import components as restoration
from pingscope.experiments.studies.mechanism import mechanism, patching
from pingscope.experiments.studies.mechanism.attribution import attribution_study, shown_layers
from pingscope.experiments.studies.mechanism.components import (
    Restored,
    greedy,
    held_out_family,
    restoration_study,
    smallest_set,
)
from pingscope.experiments.studies.mechanism.decision import log_odds_of, refusal_log_odds
from pingscope.experiments.studies.mechanism.mechanism import mechanism_claims
from pingscope.experiments.studies.mechanism.patching import patching_study
from pingscope.experiments.studies.mechanism.readout import readout_study
from pingscope.experiments.studies.mechanism.replicate import tabulate
from pingscope.experiments.studies.tracking.detectors import detector_study, read_prompts
from pingscope.experiments.tasks.records import Record
from pingscope.interp.causal.patching import Component
from pingscope.interp.errors import UserError
from pingscope.interp.files import write_json
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.logistic import LayerProbes

pytestmark = pytest.mark.slow

WORDS = "buy laptop friend invoice office notes page inbox click link list items".split()


def records(n, seed, prefix):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        label = ("harmful", "benign", "lookalike")[i % 3]
        words = [*rng.choice(WORDS, 4), "password" if label == "harmful" else "settings", str(i)]
        kind = ("privacy", "content")[(i // 3) % 2]
        found.append(
            Record(f"{prefix}{i}", " ".join(words), label, kind, context="The page shows a list.", system="Be kind.")
        )
    return found


TASKS, CHOOSING = records(36, 0, "t"), records(36, 1, "v")


@pytest.fixture(scope="module")
def models(tiny_model):
    hf = copy.deepcopy(tiny_model.hf)
    torch.manual_seed(0)
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight.add_(1.5 * torch.randn_like(hf.model.layers[2].mlp.down_proj.weight))
    return {"base": tiny_model, "agent": HookedModel(hf, tiny_model.tokenizer, name="agent")}


@pytest.fixture(scope="module")
def probes(models):
    rng = np.random.default_rng(0)
    return {name: LayerProbes((1, 2, 3), rng.standard_normal((3, 64)), np.zeros(3)) for name in models}


@pytest.fixture(scope="module")
def refusals(models):
    """Tokens that the base says and the agent does not, as the class of refusals."""
    rows = {name: [model.render(task.prompt()) for task in TASKS] for name, model in models.items()}
    mass = {name: models[name].next_token_logits(rows[name]).softmax(-1).mean(0) for name in models}
    ids = (mass["base"] > mass["agent"]).nonzero()[:, 0].tolist()
    with pytest.MonkeyPatch.context() as patch:
        for module in (patching, restoration):
            patch.setattr(module, "refusal_tokens", lambda model, refusals=(): ids)
        yield ids


@pytest.fixture(scope="module")
def patched(models, refusals):
    return patching_study(models, TASKS[:18], judged=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def restored(models, refusals):
    return restoration_study(models, CHOOSING, TASKS, AnyAction, max_turns=1, max_new_tokens=3, held_out="privacy")


@pytest.fixture(scope="module")
def attributed(models, probes):
    return attribution_study(models, probes["base"], TASKS)


def test_log_odds_are_those_of_the_probabilities(tiny_model):
    rows = [tiny_model.render("Buy it.")]
    p = tiny_model.next_token_logits(rows).double().softmax(-1)[0, [3, 5]].sum()
    assert refusal_log_odds(tiny_model, rows, [3, 5])[0] == pytest.approx(float(torch.log(p / (1 - p))), abs=1e-5)
    logits = torch.randn(2, 9, requires_grad=True)
    log_odds_of([1])(logits).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_attribution_lays_the_loss_at_the_component_that_changed(attributed):
    section = attributed
    assert section["n"] == {"harmful": 12, "benign": 12}
    for layer, cell in section["layers"].items():
        lost = {name: one["value"] for name, one in zip(cell["components"], cell["lost"], strict=True)}
        assert sum(lost.values()) == pytest.approx(cell["total"]["lost"]["value"], abs=1e-4)
        upstream = [name for name in lost if name not in ("mlp 2", "attention 3", "mlp 3")]
        assert all(abs(lost[name]) < 1e-5 for name in upstream)
        if layer == "2":
            assert lost["mlp 2"] == pytest.approx(cell["total"]["lost"]["value"], abs=1e-4) and lost["mlp 2"] != 0
        assert cell["largest_residue"] < 1e-4 and len(cell["random"]) == 3
        assert len(cell["shuffled"]["low"]) == len(cell["components"])


def test_the_patching_map_turns_where_the_change_is(patched):
    section = patched
    denoise = section["maps"]["denoise"]["harmful"]
    assert set(denoise) == {"embed", "0", "1", "2", "3"}
    assert {"system", "instruction", "page", "header", "final", "prompt"} <= set(denoise["0"])
    for layer, roles in denoise.items():
        wanted = 1.0 if layer in ("2", "3") else 0.0
        assert roles["prompt"]["share"]["value"] == pytest.approx(wanted, abs=1e-3), layer
    assert denoise["3"]["final"]["share"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert denoise["3"]["instruction"]["share"]["value"] == pytest.approx(0.0, abs=1e-3)
    noise = section["maps"]["noise"]["harmful"]
    assert noise["3"]["final"]["share"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert noise["1"]["prompt"]["share"]["value"] == pytest.approx(0.0, abs=1e-3)
    # The agent's own state of another benign prompt is not the base's: it restores nothing.
    neutral = [cell["final"]["neutral"]["value"] for cell in denoise.values()]
    assert len(neutral) == 5 and all(value < 0.5 for value in neutral)
    assert denoise["embed"]["header"]["neutral"]["value"] == pytest.approx(0.0, abs=1e-3)  # the same in every prompt
    # A foreign prompt's whole state brings the foreign decision, not this prompt's.
    moved = [cell["prompt"]["control"]["value"] for cell in denoise.values()]
    assert any(abs(value - 1.0) > 1e-3 for value in moved)
    assert set(section["outcome"]["denoise"]["3"]) == {"instruction", "final"}
    assert section["outcome"]["denoise"]["3"]["final"]["harmful"]["control"]["n"] == 2


def test_the_search_finds_the_one_component(restored):
    section = restored
    assert section["chosen"] == ["mlp 2"] and section["components"] == 20 and section["share"] == 0.05
    assert section["family"] == "privacy" and section["families"] == ["content"]
    assert section["forward_passes"] <= 200
    # Other tokens keep the agent's MLP, and later layers see them: nearly all, not all.
    assert section["held_out"]["restored"]["value"] > 0.5 > section["held_out"]["random"]["restored"]["value"]
    assert section["held_out"]["restored"]["n"] == 6


def test_greedy_stops_at_the_target_and_drops_what_is_needless():
    worth = {Component(0): 0.3, Component(1): 0.0, Component(2): 0.9, Component(3): 0.2}

    def restored(chosen):
        # Component 2 works only beside component 3, and makes component 0 needless.
        value = sum(worth[c] for c in chosen if c.layer != 2)
        value = 1.0 if {2, 3} <= {c.layer for c in chosen} else value
        return Restored(value, value)

    found = greedy(sorted(worth), restored, target=0.8)
    assert set(found.chosen) == {Component(2), Component(3)} and found.passes <= 12
    none = greedy(sorted(worth), lambda chosen: Restored(0.0, 0.0))
    assert none.chosen == () and none.passes == 4
    counted = []

    def expensive(chosen):
        counted.append(1)
        return Restored(0.001 * len(chosen), 0.0)

    many = greedy([Component(layer) for layer in range(50)], expensive, budget=40)
    assert len(counted) == many.passes <= 40


def test_many_small_parts_are_found_by_rank_and_pruned():
    """Greedy has passes for ten components; the fewest that reach the target are fifteen, one of them useless."""
    components = [Component(layer, head) for layer in range(10) for head in range(10)]
    useful = dict.fromkeys(components[:3] + components[4:15], 0.06)

    def restored(chosen):
        value = sum(useful.get(component, 0.0) for component in chosen)
        return Restored(value, value)

    found = smallest_set(components, restored, target=0.8, budget=200)
    assert set(found.chosen) == set(useful) and found.restored.decisions == pytest.approx(0.84)
    assert found.passes <= 200 and [component for component, _ in found.path] == list(found.chosen)
    assert found.path[-1][1] == found.restored


def test_the_smaller_of_two_sets_wins_within_the_budget():
    components = [Component(layer) for layer in range(20)]
    counted = []

    def restored(chosen):
        counted.append(1)
        # The ranking's last component does it all; the others have to be put together.
        value = 0.9 if components[-1] in chosen else 0.1 * len(chosen)
        return Restored(value, value)

    found = smallest_set(components, restored, target=0.8)
    assert found.chosen == (components[-1],) and found.passes == len(counted) <= 200
    hopeless = smallest_set(components, lambda chosen: Restored(0.01 * len(chosen), 0.0), target=0.8)
    assert hopeless.restored.decisions == 0.0 and hopeless.passes <= 200 and len(hopeless.chosen) > 1


def test_a_claim_says_gains_where_success_rose(restored):
    held = restored["held_out"] | {"cost": {"value": -0.03, "ci": [-0.1, 0.0], "n": 6, "n_missing": 0}}
    section = {"attribution": {"layers": {}}, "restoration": restored | {"held_out": held}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism, "_carriers", lambda cell: {"id": "components-lost"})
        claim = mechanism_claims(section)[-1]
    assert "gains 3 points of benign success" in claim["text"] and "costs" not in claim["text"]


def test_a_pair_without_a_loss_is_said_not_divided_by(models, refusals):
    same = {"base": models["base"], "agent": models["base"]}
    with pytest.raises(UserError, match="nothing to restore"):
        restoration_study(same, CHOOSING, TASKS, AnyAction)
    section = patching_study(same, TASKS[:6], judged=0)
    cells = [cell for roles in section["maps"]["denoise"]["harmful"].values() for cell in roles.values()]
    assert all(cell["share"]["value"] is None for cell in cells)
    assert all(abs(cell["moved"]["value"]) < 1e-4 for cell in cells)


def test_one_family_cannot_be_held_out():
    with pytest.raises(UserError, match="two categories"):
        held_out_family([task for task in TASKS if task.category == "privacy"])
    assert held_out_family(TASKS) == "content"


def test_readout_counts_and_cosines(models, probes):
    section = readout_study(models, probes, TASKS, max_new_tokens=3)
    for name in models:
        assert sum(section["n"][name].values()) == len(TASKS)
        assert set(section["lens"][name]) == {"1", "2", "3"}
    # At the last layer the lens is the model's own head.
    rows = [models["base"].render(task.prompt()) for task in TASKS]
    from pingscope.interp.chat.beginnings import token_classes

    ids = token_classes(models["base"].tokenizer)["refusal"]
    mass = models["base"].next_token_logits(rows).softmax(-1)[:, list(ids)].sum(1)
    harmful = [task.label == "harmful" for task in TASKS]
    wanted = float(mass[torch.tensor(harmful)].mean())
    assert section["lens"]["base"]["3"]["harmful"]["refusal"]["value"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert -1 <= section["cosine"]["2"]["probes"] <= 1


def test_detectors_are_read_on_test_tasks(models):
    section = detector_study({"base": models["base"]}, CHOOSING, TASKS, layers=[1, 3])
    cell = section["base"]
    assert cell["layer"] in ("1", "3") and cell["n"]["test"] == 36
    assert cell["n"]["train"] + cell["n"]["selection"] == 36
    assert cell["detectors"]["words"]["auroc"]["value"] == 1.0  # the word "password" tells
    assert cell["deep_layers"] == ["1", "3"] and "coherence, several layers" in cell["detectors"]


def test_detectors_read_from_the_instruction_on(models):
    found = read_prompts(models["base"], TASKS[:4], 1, [0, 1])
    for record, states, deep in zip(TASKS, found.states, found.deep, strict=False):
        row = models["base"].render(record.prompt())
        first = row.roles.index("instruction")
        assert first > 0 and states.shape == (row.n_prompt - first, 64) and deep.shape == (row.n_prompt - first, 128)
        whole = models["base"].residuals([row], [1])[1][0]
        assert states[-1] == pytest.approx(whole[row.final].numpy(), abs=1e-4)
        assert deep[:, 64:] == pytest.approx(states)


def test_deep_models_show_a_dozen_layers():
    assert shown_layers(range(-1, 8)) == list(range(8))
    assert shown_layers(range(80))[-1] == 79 and len(shown_layers(range(80))) == 12


def test_claims_follow_the_numbers(attributed, patched, restored):
    sections = {"attribution": attributed, "patching": patched, "restoration": restored}
    claims = {claim["id"]: claim for claim in mechanism_claims(sections)}
    assert set(claims) == {"components-lost", "state-restores", "few-components"}
    assert claims["state-restores"]["holds"] is True
    assert "mlp 2" in claims["few-components"]["text"]


def test_tables_over_runs_hold_every_run(attributed, patched, restored, models, probes, tmp_path):
    sections = {
        "attribution": attributed,
        "patching": patched,
        "readout": readout_study(models, probes, TASKS, max_new_tokens=3),
        "detectors": detector_study({"base": models["base"]}, CHOOSING, TASKS, layers=[1]),
    }
    for name, more in (("one", {"restoration": restored}), ("two", {})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", sections | more)
    text = tabulate([tmp_path / "one", tmp_path / "two"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 4 for line in lines)
    assert "| chosen | mlp 2 | nothing to restore |" in lines
    total = attributed["layers"]["3"]["total"]["lost"]["value"]
    assert any(line.startswith(f"| **lost** | {total:+.2f} [") for line in lines)
    assert any(line.startswith("| base into agent, 3, final | 100 [") for line in lines)


def test_the_report_draws_every_section(attributed, patched, restored, models, probes, tmp_path):
    from pingscope.figures.report import build_report

    sections = {
        "attribution": attributed,
        "patching": patched,
        "restoration": restored,
        "readout": readout_study(models, probes, TASKS, max_new_tokens=3),
        "detectors": detector_study({"base": models["base"]}, CHOOSING, TASKS, layers=[1]),
    }
    write_json(tmp_path / "results.json", {"schema_version": 1, "meta": {}, "claims": [], **sections})
    page = build_report(tmp_path).read_text()
    for name in ("attribution", "patching", "restoration", "detectors"):
        assert f'<section id="{name}"' in page
    assert "mlp 2" in page and "held-out family (privacy)" in page
