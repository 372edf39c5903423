"""Batched generation: order, end tokens, settings of the checkpoint, sampling, the first token."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import TEMPLATE, build_model, train_tokenizer

from pingscope.experiments.studies.mechanism.decision import refusal_log_odds, refusal_tokens
from pingscope.interp import Edit, HookedModel, Prompt, UserError, first_token_distribution
from pingscope.interp.chat.beginnings import first_tokens, where_answers_differ
from pingscope.interp.generate.generation import end_ids, generate
from pingscope.interp.model.selection import final


@pytest.fixture
def model():
    tokenizer = train_tokenizer()
    return HookedModel(build_model("llama", len(tokenizer)), tokenizer, name="tiny")


def rows_of(model, n=7):
    return [
        model.render(Prompt(f"p{i}", "Buy the laptop " * (1 + 3 * i % 5), prefix="# Note" * (i % 2))) for i in range(n)
    ]


def test_order_and_progress_do_not_depend_on_batches(model):
    rows, done = rows_of(model), []
    all_at_once = generate(model, rows, max_new_tokens=6)
    assert generate(model, rows, max_new_tokens=6, token_budget=60, progress=done.append) == all_at_once
    assert [g.id for g in all_at_once] == [row.id for row in rows]
    assert sum(done) == len(rows) and len(done) > 2
    assert generate(model, [], max_new_tokens=6) == []


def test_an_answer_ends_at_the_end_token_and_never_holds_the_prefix(model):
    rows = rows_of(model)
    first = generate(model, rows, max_new_tokens=4)
    said = first[0].ids[1]
    model.hf.generation_config.eos_token_id = [said, 3]
    for g, full in zip(generate(model, rows, max_new_tokens=4), first, strict=True):
        cut = next((i for i, token in enumerate(full.ids) if token in (said, 3)), None)
        assert (g.ids, g.finished) == (full.ids[:cut], cut is not None)
        assert g.text == model.tokenizer.decode(g.ids) and "# Note" not in g.text


def test_end_tokens_are_those_of_settings_tokenizer_and_template(model):
    tokenizer = model.tokenizer
    model.hf.generation_config.eos_token_id = 4
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.eos_token = "<s>"
    assert end_ids(model) == [4, tokenizer.convert_tokens_to_ids("<s>"), turn]
    model.hf.generation_config.eos_token_id = None
    tokenizer.eos_token = "<|end|>"
    assert end_ids(model) == [turn]


def test_the_checkpoints_own_sampling_settings_and_penalties_are_left_out(model, caplog):
    rows = rows_of(model)
    plain = generate(model, rows, max_new_tokens=8)
    own = model.hf.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.top_k = 5.0, True, 0.3, 3
    own.suppress_tokens = [plain[0].ids[0]]
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        assert generate(model, rows, max_new_tokens=8) == plain
    assert not caplog.records
    assert model.hf.generation_config is own and own.repetition_penalty == 5.0


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(model):
    rows = rows_of(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(model, rows, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert generate(model, rows, max_new_tokens=8, temperature=1.0, seed=1) == first
    assert generate(model, rows, max_new_tokens=8, temperature=1.0, seed=2) != first


def test_sampling_follows_the_models_distribution(model):
    row = model.render(Prompt("p", "Buy the laptop"))
    probability = (model.next_token_logits([row])[0] / 0.7).softmax(-1)
    said = generate(model, [row] * 2000, max_new_tokens=1, temperature=0.7, token_budget=10**6)
    counts = torch.bincount(torch.tensor([g.ids[0] if g.ids else 1 for g in said]), minlength=len(probability))
    assert (counts / 2000 - probability).abs().max() < 4 * (0.25 / 2000) ** 0.5
    assert counts[probability.argsort()[:200]].sum() > 0  # no top-k


def test_too_long_for_the_context(model):
    row = model.render(Prompt("long", "Buy the laptop for my friend " * 200))
    for call in (
        lambda: generate(model, [row]),
        lambda: model.next_token_logits([row]),
        lambda: model.residuals([row]),
    ):
        with pytest.raises(UserError, match=rf"'long': {len(row)} tokens.* 512"):
            call()
    fits = model.render(Prompt("fits", "Buy the laptop"))
    with pytest.raises(UserError, match="508 new tokens"):
        generate(model, [fits], max_new_tokens=508)
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(model, [fits], max_new_tokens=0)


def test_first_token_distribution(model):
    rows = rows_of(model)
    starts = {"refusal": ["I cannot", "I am"], "action": ["do(", "exit("], "everything": ["I", "do("]}
    got = first_token_distribution(model, rows, starts)
    probability = model.next_token_logits(rows).softmax(-1)
    one = model.tokenizer("I cannot", add_special_tokens=False)["input_ids"][0]
    assert torch.allclose(got["refusal"], probability[:, one])  # both texts begin with the same token: once
    push = torch.zeros(model.d_model)
    steered = first_token_distribution(model, rows, starts, [Edit(3, final(), lambda x: x * 0 + push + 1)])
    assert not torch.allclose(steered["refusal"], got["refusal"])
    with pytest.raises(UserError, match="no text"):
        first_token_distribution(model, rows, {"empty": []})


def test_the_first_token_is_read_behind_what_every_answer_begins_with(model):
    """GLM-4's manner: the header is asked for without the line end that every answer then begins with."""
    model.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    plain, begun = model.render("Buy the laptop."), model.render("Buy the laptop.", prefix="I cannot")
    (line_end,) = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    behind, same = where_answers_differ(model, [plain, begun])
    assert behind.ids == (*plain.ids, line_end) and behind.final == plain.final and same == begun
    starts = {"refusal": ["I cannot"], "action": ["do("]}
    got = first_token_distribution(model, [plain, begun], starts)
    (refusal,) = first_tokens(model, "I cannot")
    probability = model.next_token_logits([behind, begun]).softmax(-1)[:, refusal]
    assert torch.allclose(got["refusal"], probability)
    assert not torch.allclose(got["refusal"][0], model.next_token_logits([plain]).softmax(-1)[0, refusal])
    ids = refusal_tokens(model)
    assert refusal_log_odds(model, [plain], ids) == refusal_log_odds(model, [behind], ids)
    model.tokenizer.chat_template = TEMPLATE
    assert where_answers_differ(model, [plain]) == [plain]


def test_adapters_stay_active_through_peft(model):
    import peft

    rows = rows_of(model)
    plain = model.residuals(rows, 3)[3]
    adapted = peft.get_peft_model(model.hf, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped = HookedModel(adapted, model.tokenizer)
    assert wrapped.n_layers == 4
    assert not torch.allclose(wrapped.residuals(rows, 3)[3][0], plain[0])
