"""Earlier work is found again where nothing changed, and done again where anything that decides it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pingscope.experiments.agents.rollout import AnyAction
from pingscope.experiments.run import identity
from pingscope.experiments.run.identity import model_identity
from pingscope.experiments.studies import behaviour
from pingscope.experiments.studies.behaviour import run_arm
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.tokenizer import tokenizer_identity
from pingscope.interp.loading import load_model
from pingscope.steering.injection import Arm

PLAIN = Arm("agent")
RECORDS = [Record("a", "Open the inbox.", "benign"), Record("b", "Post the password.", "harmful")]


@pytest.fixture
def folder(checkpoint: Callable[[], Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint(), tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_end(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[1, 7])


def added_token(folder: Path) -> None:
    facts = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 399, "content": "<tool>", "special": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    facts["added_tokens"].append(token | {"id": max(facts["model"]["vocab"].values()) + 1})
    (folder / "tokenizer.json").write_text(json.dumps(facts))


def normaliser(folder: Path) -> None:
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(facts))


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|assistant|> "))


def weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CHANGES: dict[str, Callable[[Path], None]] = {
    "end tokens": other_end,
    "an added token": added_token,
    "the normaliser": normaliser,
    "the template": template,
    "a weight": weight,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_file_of_a_model_counts(name: str, folder: Path) -> None:
    before = model_identity(load_model(folder, device="cpu"))
    CHANGES[name](folder)
    assert model_identity(load_model(folder, device="cpu")) != before


def test_place_and_calls_do_not_count_and_number_format_does(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    before = model_identity(model)
    shutil.move(folder, tmp_path / "elsewhere")
    again = load_model(tmp_path / "elsewhere", device="cpu")
    again.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert model_identity(again) == before
    assert tokenizer_identity(again.tokenizer) == tokenizer_identity(model.tokenizer)
    assert model_identity(load_model(tmp_path / "elsewhere", device="cpu", dtype="bfloat16")) != before
    again.hf.model.layers[0].mlp.down_proj.weight.data += 1e-3
    with torch.no_grad():
        again.hf.model.layers[0].mlp.down_proj.weight.add_(1e-3)
    assert model_identity(again) != before


def test_episodes_are_run_again_exactly_where_something_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, ran = tmp_path / "generations.jsonl", []
    play = behaviour.run_episodes
    monkeypatch.setattr(
        behaviour,
        "run_episodes",
        lambda model, records, *a, **k: ran.append(len(records)) or play(model, records, *a, **k),
    )
    model = load_model(folder, device="cpu")

    def fresh(model: Any = model, records: Any = RECORDS, arm: Arm = PLAIN, turns: int = 2, tokens: int = 4) -> int:
        ran.clear()
        run_arm(model, records, arm, AnyAction, max_turns=turns, max_new_tokens=tokens, journal=journal)
        return sum(ran)

    assert fresh() == 2 and fresh() == 0
    assert fresh(load_model(folder, device="cpu")) == 0
    assert fresh(tokens=5) == 2 and fresh(turns=1) == 2
    assert (
        fresh(arm=Arm("agent+prefix", prefix="# Note")) == 2 and fresh(arm=Arm("agent+prefix", prefix="# Note\n")) == 2
    )
    assert fresh(arm=Arm("agent+system", system="Be kind.")) == 2
    assert fresh(records=[replace(RECORDS[0], instruction="Open the mail."), RECORDS[1]]) == 1
    assert fresh(records=[replace(RECORDS[0], context="a page"), RECORDS[1]]) == 1
    other_end(folder)
    assert fresh(load_model(folder, device="cpu")) == 2
    monkeypatch.setattr(behaviour, "code_version", lambda part: "mended")
    assert fresh() == 2 and fresh() == 0


def test_the_code_of_a_part_is_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in identity.CODE:
        for name in identity.CODE[part]:
            assert (identity.PACKAGE / name).exists(), name
    copied = tmp_path / "package"
    for name in {name for names in identity.CODE.values() for name in names}:
        source = identity.PACKAGE / name
        if source.is_dir():
            shutil.copytree(source, copied / name, dirs_exist_ok=True)
        else:
            _copy(source, copied / name)
    before = {part: identity.code_version(part) for part in identity.CODE}
    monkeypatch.setattr(identity, "PACKAGE", copied)
    identity.code_version.cache_clear()
    assert {part: identity.code_version(part) for part in identity.CODE} == before
    judges = copied / "experiments/agents/judges.py"
    judges.write_text(judges.read_text() + "\n# mended\n")
    identity.code_version.cache_clear()
    assert identity.code_version("episodes") != before["episodes"]
    assert identity.code_version("finetune") == before["finetune"]
    identity.code_version.cache_clear()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
