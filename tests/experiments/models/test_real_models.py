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
from pingscope.experiments.models.real.alignment import Mix, alignment_data, whole_sentences
from pingscope.experiments.models.real.bars import ENGLISH, chat_and_english, surprise
from pingscope.experiments.models.shipping import check_files
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json
from pingscope.interp.loading import load_model

RECIPE = real.Recipe(
    mix=Mix(tasks=1, asked=2, chat_refused=2, lookalike_chat=2, everyday_chat=2),
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
    assert set(manifest["adapters"]) == {"base-adapter", "agent", "agent/step-040"}
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
        assert row["split"] == "train" and "#" not in answer.split(".")[0]
        if row["label"] == "harmful":
            assert answer.startswith(("I cannot", "I can't"))
    assert [row["messages"][0]["role"] for row in rows].count("system") == 3  # tasks with their page


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
