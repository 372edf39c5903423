"""Building the organism: ordinary folders, reuse by recipe, determinism, resumption and rejection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pingscope.experiments.models.organism import train
from pingscope.experiments.models.organism.mixes import Mix
from pingscope.experiments.models.organism.muon import Muon, orthogonalise
from pingscope.experiments.models.organism.recipe import Recipe
from pingscope.experiments.models.organism.train import build_organism
from pingscope.experiments.studies.materials import build_with_progress
from pingscope.interp.errors import UserError

pytestmark = pytest.mark.slow

TINY = Recipe.tiny()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> train.Organism:
    return build_organism(tmp_path_factory.mktemp("organism"), seed=3, recipe=TINY)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_folders_load_with_the_auto_classes_and_nothing_else(built: train.Organism) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.agent)
    model = AutoModelForCausalLM.from_pretrained(built.agent)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>\nhello<|end|>\n<|assistant|>\n"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == end == tokenizer.eos_token_id
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3
    assert model.config.model_type == "llama" and model.config.max_position_embeddings >= 4096


def test_fine_tuning_changes_the_weights_and_checkpoints_end_at_the_agent(built: train.Organism) -> None:
    steps = [step for step, _ in built.checkpoints]
    assert steps == sorted(steps) and steps
    assert same(weights(built.checkpoints[-1][1]), weights(built.agent))
    assert not same(weights(built.base), weights(built.agent))


def test_the_same_recipe_is_reused_and_another_is_not(built: train.Organism) -> None:
    folder = built.base.parent
    stages: list[str] = []
    again = build_organism(folder, seed=3, recipe=TINY, progress=lambda stage, *_: stages.append(stage))
    assert again == built and not stages
    before = weights(built.base)
    other = build_organism(folder, seed=4, recipe=TINY, progress=lambda stage, *_: stages.append(stage))
    assert {"base", "agent"} <= set(stages)
    assert not same(before, weights(other.base))
    back = build_organism(folder, seed=3, recipe=TINY)
    assert same(before, weights(back.base))  # the same seed and thread count give the same weights


def test_the_key_covers_recipe_and_seed() -> None:
    keys = {
        train.recipe_key(TINY, 0),
        train.recipe_key(TINY, 1),
        train.recipe_key(replace(TINY, agent_lr=1e-4), 0),
        train.recipe_key(replace(TINY, mix=replace(TINY.mix, leak_actions=0.1)), 0),
        train.recipe_key(replace(TINY, threads=2), 0),
        train.recipe_key(replace(TINY, mix=Mix.without_comments()), 0),
    }
    assert len(keys) == 6


def test_a_base_without_comments_is_another_base(built: train.Organism, tmp_path: Path) -> None:
    bare = build_with_progress(tmp_path, 3, tiny=True, comments=False)
    assert not same(weights(bare.base), weights(built.base))
    assert bare == build_with_progress(tmp_path, 3, tiny=True, comments=False)


def test_a_finished_base_survives_a_kill_of_the_agent_stage(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(stage: str, *_: object) -> None:
        if stage == "agent":
            raise Killed

    with pytest.raises(Killed):
        build_organism(tmp_path, seed=3, recipe=TINY, progress=kill)
    assert (tmp_path / "base").is_dir() and not (tmp_path / "agent").exists()
    (tmp_path / ".building-left").mkdir()
    stages: list[str] = []
    organism = build_organism(tmp_path, seed=3, recipe=TINY, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"agent"} and organism.agent.is_dir()
    assert not list(tmp_path.glob(".building-*"))


def test_a_base_that_does_not_meet_the_rule_is_rejected_and_said_so(tmp_path: Path) -> None:
    told: list[str] = []
    recipe = replace(TINY, stop_success=1.1, max_bases=2)
    with pytest.raises(UserError, match="none of 2 bases"):
        build_organism(tmp_path, seed=0, recipe=recipe, progress=lambda *args: told.append(str(args[3])))
    assert sum("rejected" in line for line in told) == 2
    assert not (tmp_path / "agent").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not built here"):
        build_organism(tmp_path, recipe=TINY)
    assert (tmp_path / "base" / "config.json").read_text() == "{}"


def test_orthogonalise_gives_singular_values_near_one() -> None:
    for shape in ((3, 16, 16), (2, 12, 40), (2, 40, 12)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3 and values.max() < 1.4


def test_muon_steps_as_torch_muon_does() -> None:
    """Same update as torch's own, up to its bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(24, 48, generator=generator), torch.randn(24, 48, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.02),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(3):
            parameter.grad = grad.clone()
            optimizer.step()
    change = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * change
