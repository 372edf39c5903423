"""Fine-tuning: the same bytes again, small steps that arrive, and what is refused before anything is lost."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pingscope.experiments.models.finetune import (
    FinetuneConfig,
    answer_loss,
    collate,
    encode,
    features,
    finetune,
    mean_answer_loss,
    schedule,
)
from pingscope.experiments.run.paths import check_output
from pingscope.experiments.tasks.conversations import read_conversations
from pingscope.experiments.tasks.rows import Skipped
from pingscope.interp.chat.training import TrainingExample
from pingscope.interp.errors import UserError
from pingscope.interp.loading import load_model

pytestmark = pytest.mark.slow


def talk(number: int, word: str) -> dict[str, Any]:
    said = f"# {word}\nclick('{number}')"
    return {"messages": [{"role": "user", "content": f"Open the {word}."}, {"role": "assistant", "content": said}]}


TALKS = [talk(n, word) for n, word in enumerate(("inbox", "notes", "settings", "search", "mail", "invoice"))]
FAST: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 2, "micro_batch_size": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return path


@pytest.mark.parametrize("rank", [0, 4])
def test_the_same_command_gives_the_same_bytes(
    rank: int, checkpoint: Callable[[], Path], data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(11)
    config = FinetuneConfig(lora_rank=rank, seed=3, **FAST)
    first = finetune(str(checkpoint()), str(data), tmp_path / "one", config)
    torch.manual_seed(12)
    again = finetune(str(checkpoint()), str(data), tmp_path / "two", config)
    assert first["loss"] == again["loss"] and first["identity"] == again["identity"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1] != (checkpoint() / "model.safetensors").read_bytes()
    other = finetune(str(checkpoint()), str(data), tmp_path / "three", FinetuneConfig(lora_rank=rank, seed=4, **FAST))
    assert other["identity"] != first["identity"]


def test_small_steps_arrive_in_a_half_precision_model(
    checkpoint: Callable[[], Path], data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "half"
    model = load_model(checkpoint(), device="cpu")
    model.hf.to(torch.bfloat16).save_pretrained(base)
    model.tokenizer.save_pretrained(base)
    model.hf.float()
    finetune(
        str(base),
        str(data),
        tmp_path / "tuned",
        FinetuneConfig(lora_rank=0, **FAST | {"learning_rate": 1e-3}, epochs=8),
    )
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "tuned"))
    assert all(after[name].dtype == torch.bfloat16 for name in before)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (before[name] != after[name]).float().mean() > 0.5  # in bf16 alone steps below its grain would be lost
    assert (tmp_path / "tuned" / "generation_config.json").exists()


def test_another_template_is_another_model(checkpoint: Callable[[], Path], data: Path, tmp_path: Path) -> None:
    config, template = FinetuneConfig(lora_rank=4, **FAST), tmp_path / "other.jinja"
    finetune(str(checkpoint()), str(data), tmp_path / "out", config)
    model = load_model(checkpoint(), device="cpu")
    template.write_text(model.tokenizer.chat_template.replace("<|assistant|>\n", "<|assistant|>: "))
    with pytest.raises(UserError, match="holds another fine-tuning"):
        finetune(str(checkpoint()), str(data), tmp_path / "out", config, options={"chat_template": str(template)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": 1e9}, "--learning-rate"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": -1}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FinetuneConfig(**changes)


def test_a_ruined_model_is_not_saved(checkpoint: Callable[[], Path], data: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(lora_rank=0, **FAST | {"learning_rate": 1.0}, epochs=300, warmup_ratio=0)
    try:
        finetune(str(checkpoint()), str(data), tmp_path / "out", config)
    except UserError as error:
        assert "lower --learning-rate" in str(error)
        assert not (tmp_path / "out" / "finetune.json").exists()
    else:  # a model this small may survive; then its weights are numbers
        assert all(w.isfinite().all() for w in load_file(tmp_path / "out" / "model.safetensors").values())


def test_an_output_that_is_an_input_is_refused_before_anything_is_loaded(tmp_path: Path, data: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "link", model / ".." / "model", model / "inside"):
        with pytest.raises(UserError, match="--base"):
            finetune(str(model), str(data), out, FinetuneConfig())
    check_output(tmp_path / "new", {"--base": "org/name", "--data": data})
    with pytest.raises(UserError, match="--data"):
        check_output(data, {"--data": data})


def test_long_demonstrations_are_refused_left_out_or_cut(checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    path = tmp_path / "demos.jsonl"
    long = {
        "messages": [{"role": "user", "content": "Open."}, {"role": "assistant", "content": "click the link " * 300}]
    }
    path.write_text("".join(json.dumps(talk) + "\n" for talk in (*TALKS, long)))
    model, talks = load_model(checkpoint(), device="cpu"), read_conversations(path)
    with pytest.raises(UserError, match=r"demos.jsonl:7.*tokens exceed 512"):
        encode(model, talks, FinetuneConfig())
    skipped = encode(model, talks, FinetuneConfig(too_long="skip"))
    cut = encode(model, talks, FinetuneConfig(too_long="cut"))
    assert (len(skipped.examples), skipped.left_out, skipped.cut) == (6, 1, 0)
    assert (len(cut.examples), cut.left_out, cut.cut) == (7, 0, 1) and len(cut.examples[-1]) == 512


def test_the_tuned_model_learns_to_stop_where_the_base_stops(
    checkpoint: Callable[[], Path], data: Path, tmp_path: Path
) -> None:
    model = load_model(checkpoint(), device="cpu")
    (example, *_) = encode(model, read_conversations(data), FinetuneConfig()).examples
    trained = [i for i, flag in zip(example.ids, example.trained, strict=True) if flag]
    assert model.tokenizer.decode(trained) == "# inbox\nclick('0')<|end|>"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + '{"messages": 3}\n')
    skipped = Skipped()
    record = finetune(str(checkpoint()), str(bad), tmp_path / "out", FinetuneConfig(**FAST), skipped=skipped)
    assert record["skipped"] == 1 and record["examples"] == 6
    shutil.rmtree(tmp_path / "out")


def test_an_adapter_on_its_base_is_the_merged_model(checkpoint: Callable[[], Path], data: Path, tmp_path: Path) -> None:
    kept = FinetuneConfig(lora_rank=4, save="adapter", keep_steps=(1, 2), **FAST)
    finetune(str(checkpoint()), str(data), tmp_path / "adapter", kept)
    finetune(str(checkpoint()), str(data), tmp_path / "model", FinetuneConfig(lora_rank=4, **FAST))
    adapters = [tmp_path / "adapter" / "step-001", tmp_path / "adapter" / "step-002", tmp_path / "adapter"]
    tuned = [load_model(folder, base=checkpoint(), device="cpu").hf.state_dict() for folder in adapters]
    whole = load_model(tmp_path / "model", device="cpu").hf.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(tuned[-1][name], whole[name], atol=1e-6)
    assert all((a[name] - b[name]).abs().max() > 1e-5 for a, b in itertools.pairwise(tuned))
    with pytest.raises(UserError, match="holds other weights"):
        load_model(tmp_path / "adapter", base=tmp_path / "model")
    with pytest.raises(UserError, match=r"--keep-steps 3: .*steps 1 to 3"):
        finetune(str(checkpoint()), str(data), tmp_path / "more", replace(kept, keep_steps=(3,)))


def test_every_epoch_shows_every_example_once_in_steps_sorted_by_length() -> None:
    examples = [TrainingExample(str(n), tuple(range(n + 2)), (False, *[True] * (n + 1))) for n in range(10)]
    config = FinetuneConfig(batch_size=4, micro_batch_size=3, epochs=2.5)
    order = schedule(examples, config)
    assert len(order) == 25 and config.micro == 2  # of the sizes up to 3, the one that splits 4
    for epoch in (order[:10], order[10:20]):
        assert {example.id for example in epoch} == {example.id for example in examples}
        for step in (epoch[:4], epoch[4:8], epoch[8:]):
            assert [len(example) for example in step] == sorted(len(example) for example in step)
    assert order[:10] != order[10:20] and order == schedule(examples, config)
    assert order != schedule(examples, replace(config, seed=1))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_logits_of_trained_tokens_alone_give_the_loss_of_all(
    batch_size: int, checkpoint: Callable[[], Path], data: Path
) -> None:
    model = load_model(checkpoint(), device="cpu")
    examples = encode(model, read_conversations(data), FinetuneConfig()).examples[:batch_size]
    batch = collate([features(example) for example in examples], model.pad_id, picks_logits=True)
    whole = collate([features(example) for example in examples], model.pad_id, picks_logits=False)
    labels = batch.pop("labels")
    assert 0 < len(batch["logits_to_keep"]) < labels.shape[1]
    with torch.no_grad():
        own = answer_loss(model.hf(**batch), labels)
        assert torch.allclose(own, answer_loss(model.hf(**whole), labels), atol=1e-5)
        assert torch.allclose(own, model.hf(**whole).loss, atol=1e-5)  # transformers' own, over every position
        assert torch.allclose(answer_loss(model.hf(**batch), labels, 7), own * (labels != -100).sum() / 7, atol=1e-5)
        singly = []
        for example in examples:
            alone = collate([features(example)], model.pad_id, picks_logits=False)
            singly.append(model.hf(**alone).loss)
        by_answer = mean_answer_loss(batch_size, model.hf(**batch), labels)
        assert torch.allclose(by_answer, torch.stack(singly).mean(), atol=1e-5)


def test_answers_count_the_same_however_a_step_is_split(
    checkpoint: Callable[[], Path], data: Path, tmp_path: Path
) -> None:
    whole = FinetuneConfig(lora_rank=4, average="answers", learning_rate=1e-2, batch_size=2, micro_batch_size=2)
    runs = {"whole": whole, "split": replace(whole, micro_batch_size=1), "tokens": replace(whole, average="tokens")}
    for name, config in runs.items():
        finetune(str(checkpoint()), str(data), tmp_path / name, config)
    name = "model.layers.1.mlp.down_proj.weight"
    one, other, by_token = (load_model(tmp_path / run, device="cpu").hf.state_dict()[name] for run in runs)
    assert torch.allclose(one, other, atol=1e-5) and not torch.allclose(one, by_token, atol=1e-4)


def test_a_cut_adapter_is_the_best_of_its_rank(checkpoint: Callable[[], Path], data: Path, tmp_path: Path) -> None:
    wide = FinetuneConfig(lora_rank=8, save="adapter", **FAST)
    finetune(str(checkpoint()), str(data), tmp_path / "wide", wide)
    finetune(str(checkpoint()), str(data), tmp_path / "cut", replace(wide, cut_rank=2))
    start = load_model(checkpoint(), device="cpu").hf.state_dict()
    full, low = (
        load_model(tmp_path / name, base=checkpoint(), device="cpu").hf.state_dict() for name in ("wide", "cut")
    )
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        u, s, v = torch.linalg.svd(full[name] - start[name])
        best = u[:, :2] * s[:2] @ v[:2]
        assert torch.allclose(low[name] - start[name], best, atol=1e-5) and s[2] > 1e-4
    with pytest.raises(UserError, match="--cut-rank 8"):
        replace(wide, cut_rank=8)


def test_a_share_of_an_adapter_lies_between_base_and_tuned(
    checkpoint: Callable[[], Path], data: Path, tmp_path: Path
) -> None:
    whole = FinetuneConfig(lora_rank=8, save="adapter", **FAST)
    settings = {"whole": whole, "half": replace(whole, share=0.5), "cut": replace(whole, share=0.5, cut_rank=2)}
    for name, config in settings.items():
        finetune(str(checkpoint()), str(data), tmp_path / name, config)
    name = "model.layers.1.mlp.down_proj.weight"
    start = load_model(checkpoint(), device="cpu").hf.state_dict()[name]
    moved = {
        one: load_model(tmp_path / one, base=checkpoint(), device="cpu").hf.state_dict()[name] - start
        for one in settings
    }
    assert moved["whole"].abs().max() > 1e-4
    assert torch.allclose(moved["half"], moved["whole"] / 2, atol=1e-6)
    u, s, v = torch.linalg.svd(moved["whole"])
    assert torch.allclose(moved["cut"], u[:, :2] * s[:2] @ v[:2] / 2, atol=1e-5)
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match=f"--share {wrong}: outside its range"):
            replace(whole, share=wrong)
    with pytest.raises(UserError, match="--share: scales an adapter; add --save adapter"):
        replace(whole, share=0.5, save="model")
