"""Doctor tries what will run: a prompt, its ids, the end of a turn and one answer; and says what came out."""

from __future__ import annotations

import json
import shutil

import pytest
import typer
from safetensors.torch import load_file, save_file
from tiny_models import TEMPLATE, build_model, train_tokenizer

from pingscope.experiments.models.doctor import doctor_command, examine
from pingscope.experiments.models.one_answer import EXAMPLE, try_prompt
from pingscope.interp import HookedModel, UserError, load_model
from pingscope.interp.generate.generation import end_ids


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def doctor(folder, **options):
    doctor_command(lambda: load_model(folder, device="cpu", **options), ["hf"], 64, None)


def found(model):
    return {finding.name: finding for finding in try_prompt(model)}


def test_a_sound_model_gets_a_verdict_and_no_empty_column(folder, capsys):
    doctor(folder)
    shown = capsys.readouterr().out
    assert f"verdict: {folder} can be trusted here" in shown and "note" not in shown
    others = [finding for finding in examine(load_model(folder)) if finding.name not in ("model", "architecture")]
    assert all(len(finding.value) <= 60 for finding in others)  # a table as wide as a terminal
    assert "one answer" in shown and "cut off at 32 tokens" in shown


def test_an_answer_that_ends_at_once_is_empty(folder):
    model = load_model(folder)
    assert not found(model)["one answer"].warning
    first = int(model.next_token_logits([model.render(EXAMPLE)])[0].argmax())
    model.hf.generation_config.eos_token_id = [first, 1]
    answer = found(model)["one answer"]
    assert "ended by itself" in answer.value and "empty" in answer.warning


def test_tokens_without_an_embedding(folder):
    config = json.loads((folder / "config.json").read_text())
    n = config["vocab_size"]
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    tokenizer.save_pretrained(folder)
    model = load_model(folder)
    vocabulary = found(model)["vocabulary"]
    assert vocabulary.fails and f"pad token '<|new pad|>' ({n})" in vocabulary.warning
    assert model.pad_id < n and len(model.residuals([model.render("Buy"), model.render("Delete it")], 0)[0]) == 2
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|new pad|>")
    model = HookedModel(model.hf, tokenizer)
    assert "token of the prompt" in found(model)["vocabulary"].warning and found(model)["one answer"].fails
    for read in (lambda rows: model.residuals(rows, 0), model.next_token_logits):
        with pytest.raises(UserError, match=r"'<\|new pad\|>' has id .* embeddings"):
            read([model.render("Buy")])
    with pytest.raises(typer.Exit):
        tokenizer.save_pretrained(folder)
        doctor(folder)


def test_generation_that_does_not_end_where_a_turn_does(folder):
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 5}))
    model = load_model(folder)
    turn = found(model)["end of a turn"]
    if 1 in end_ids(model):  # generation stops where the template ends a turn, whatever the settings say
        assert not turn.fails
    else:
        assert turn.fails and "'<|end|>'" in turn.value and "eos_token_id" in turn.warning
    assert (
        "writes nothing behind an answer"
        in found(load_model(folder, chat_template=TEMPLATE.replace("<|end|>", "")))["end of a turn"].warning
    )


def test_bos_that_opens_every_turn_is_no_doubled_bos(folder):
    chatml = TEMPLATE.replace("<|{{ message['role'] }}|>", "<s>{{ message['role'] }}")
    row = found(load_model(folder, chat_template=chatml))["BOS tokens"]
    assert row.value == "2" and not row.warning
    doubled = found(load_model(folder, chat_template="{{ bos_token }}{{ bos_token }}" + TEMPLATE))["BOS tokens"]
    assert doubled.fails and "2 BOS tokens" in doubled.warning


def test_a_head_that_says_nothing_or_nan(folder):
    file = folder / "model.safetensors"
    whole = load_file(file)
    big = whole["lm_head.weight"] / whole["lm_head.weight"].abs().max() * 3e38
    save_file(whole | {"lm_head.weight": big}, file, {"format": "pt"})
    answer = found(load_model(folder))["one answer"]
    assert answer.fails and "NaN or infinite" in answer.warning
    save_file(whole | {"model.norm.weight": whole["model.norm.weight"] * 0}, file, {"format": "pt"})
    answer = found(load_model(folder))["one answer"]
    assert answer.fails and "equally likely" in answer.warning


def test_a_template_without_system_role_is_named(folder):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    template = found(load_model(folder, chat_template=refusing))["chat template"]
    assert "refuses a system prompt" in template.warning and not template.fails


def test_heads_of_layers_that_differ_are_shown():
    tokenizer = train_tokenizer()
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    sizes = {finding.name: finding.value for finding in examine(model)}
    assert sizes["size"] == "4 layers x 64, 4 heads x 16"
