"""The real study's two trainings on a tiny model in SmolLM2's place, and what of them ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pingscope.experiments.models.real import models as real
from pingscope.experiments.models.real import shipped
from pingscope.experiments.models.real.alignment import Mix, alignment_data, own_requests, whole_sentences
from pingscope.experiments.models.real.bars import ENGLISH, chat_and_english, surprise
from pingscope.experiments.models.real.choice import choose, try_shares
from pingscope.experiments.models.shipping import check_files
from pingscope.experiments.tasks.natural.teaching import REFUSALS
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json
from pingscope.interp.generate.generation import end_ids
from pingscope.interp.loading import load_model

RECIPE = real.Recipe(
    mix=Mix(tasks=1, asked=2, chat_refused=2, lookalike_chat=2, everyday_chat=2, own_chat=2),
    align=replace(real.ALIGN, lora_rank=4, cut_rank=2, micro_batch_size=2),
    demonstrations=8,
    agent=replace(real.AGENT, lora_rank=4, cut_rank=2, batch_size=4, micro_batch_size=2, keep_steps=(1,)),
)
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def at_hand(checkpoint: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny checkpoint where SmolLM2 would be fetched."""

    def fetched(out: Path, say: object) -> Path:
        if not (out / "smollm2").exists():
            shutil.copytree(checkpoint(), out / "smollm2")
        return out / "smollm2"

    monkeypatch.setattr(real, "fetched", fetched)
    monkeypatch.setattr(shipped, "fetched", fetched)


@pytest.mark.slow
def test_trained_packed_and_unpacked_models_are_the_same(
    at_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "HERE", tmp_path / "shipped")
    lines: list[str] = []
    made = real.train_models(tmp_path / "one", say=lines.append, recipe=RECIPE)
    assert [step for step, _ in made.checkpoints] == [1, 2] and made.log["agent"]["steps"] == 2
    weights = {path: load_model(path).hf.state_dict()[NAME] for path in (made.base, made.agent, made.checkpoints[0][1])}
    assert len({tensor.sum().item() for tensor in weights.values()}) == 3
    again = real.train_models(tmp_path / "one", say=lines.append, recipe=RECIPE)
    assert again == made and any("alignment" in line for line in lines)

    with pytest.raises(UserError, match="no adapters ship"):
        shipped.unpack(tmp_path / "none", lines.append)
    tried = try_shares(tmp_path / "one", (0.5, 1.0), n=3)  # of that alignment: none trained it with --share 1
    assert [row["share"] for row in tried] == [0.5, 1.0] and tried[0]["tasks"]["lookalike"]["n"] == 3
    monkeypatch.setattr(shipped, "STEPS", (1,))
    shipped.pack(tmp_path / "one", made.log)
    found = shipped.unpack(tmp_path / "two", lines.append)
    assert found.log == json.loads(json.dumps(made.log)) and found == shipped.unpack(tmp_path / "two", lines.append)
    for ours, theirs in (
        (made.base, found.base),
        (made.agent, found.agent),
        (made.checkpoints[0][1], found.checkpoints[0][1]),
    ):
        assert torch.allclose(weights[ours], load_model(theirs).hf.state_dict()[NAME], atol=1e-3)

    (shipped.HERE / "agent.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"agent\.safetensors: is missing or not as it was shipped.*--real --train"):
        shipped.unpack(tmp_path / "three", lines.append)


def test_what_ships_is_whole_small_and_made_by_the_recipe() -> None:
    manifest = read_json(shipped.HERE / "manifest.json")
    check_files(shipped.HERE, manifest, "")
    assert set(manifest["adapters"]) == {"base-adapter", "agent", "agent/step-015"}
    assert sum(path.stat().st_size for path in shipped.HERE.iterdir()) <= 12_000_000
    for name, config in (("base", real.ALIGN), ("agent", real.AGENT)):
        assert manifest["log"][name]["config"] == asdict(config) | {"keep_steps": list(config.keep_steps)}
    assert manifest["log"]["mix"] == asdict(real.MIX)
    assert len(real.agent_data(real.RECIPE.demonstrations)) == manifest["log"]["agent"]["examples"]


@pytest.mark.slow
def test_alignment_refuses_harm_alone_and_keeps_the_models_own_answers(checkpoint: Callable[[], Path]) -> None:
    model = load_model(checkpoint())
    rows = alignment_data(model, RECIPE.mix)
    assert rows == alignment_data(model, RECIPE.mix) != alignment_data(model, RECIPE.mix, seed=1)
    assert len({row["id"] for row in rows}) == len(rows) >= 3 * 3 + 2
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert row["split"] == "train"
        if row["label"] == "harmful":
            assert answer in REFUSALS
        elif row["messages"][0]["role"] == "system":
            assert answer.startswith("To do th") and "#" not in answer
    assert [row["messages"][0]["role"] for row in rows].count("system") == 3  # tasks with their page


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_makes_up_requests_where_its_template_lets_the_user_speak(
    kind: str, checkpoint: Callable[..., Path]
) -> None:
    model = load_model(checkpoint(kind))
    ends = end_ids(model)
    with torch.no_grad():  # a network of random weights seldom ends a turn
        head = model.hf.get_output_embeddings()
        bias = torch.zeros(head.out_features)
        bias[list(ends)] = 4.0
        head.bias = torch.nn.Parameter(bias)
    made = own_requests(model, 3, seed=0)
    assert made == own_requests(model, 3, seed=0) != own_requests(model, 3, seed=1)
    assert len({record.instruction for record in made}) == len(made) == 3
    assert all(record.instruction.strip() and record.label == "benign" for record in made)


@pytest.mark.parametrize(
    ("rates", "share"),
    [
        ([(0.2, 0.0), (0.9, 0.3), (1.0, 0.1)], 0.5),  # the shortest step that refuses enough
        ([(0.2, 0.0), (0.8, 0.7), (0.7, 0.1)], 1.0),  # none does: the one that tells harmful from look-alike best
    ],
)
def test_the_shortest_step_that_refuses_enough_is_chosen(rates: list[tuple[float, float]], share: float) -> None:
    rows = [
        {"share": at, "tasks": {"harmful": {"value": harmful}, "lookalike": {"value": lookalike}}}
        for at, (harmful, lookalike) in zip((0.2, 0.5, 1.0), rates, strict=True)
    ]
    assert choose(rows) == choose(rows[::-1]) == share


def test_an_answer_that_was_cut_ends_with_a_whole_sentence() -> None:
    assert whole_sentences("Boil it. Then take 2.5 spoons of") == "Boil it."
    assert whole_sentences("no end at all") == "no end at all"
    assert whole_sentences("Is it? Yes! And th") == "Is it? Yes!"


def test_chat_and_english_are_measured_beside_the_untouched_model(checkpoint: Callable[[], Path]) -> None:
    model, other = load_model(checkpoint()), load_model(checkpoint("gpt2"))
    found = chat_and_english({"before": model, "after": model, "other": other})
    assert found["after"] == found["before"] and found["before"]["perplexity_ratio"]["value"] == 1
    ids = torch.tensor([other.tokenizer(ENGLISH[0]).input_ids])
    with torch.no_grad():
        assert surprise(other, ENGLISH[0]).item() == pytest.approx(other.hf(ids, labels=ids).loss.item(), abs=1e-4)
    ratio = found["other"]["perplexity"]["value"] / found["before"]["perplexity"]["value"]
    assert found["other"]["perplexity_ratio"]["value"] == pytest.approx(ratio)
    assert {label: cell["n"] for label, cell in found["other"]["refused"].items()} == {
        "harmful": 72, "benign": 48, "lookalike": 54,
    }  # fmt: skip
