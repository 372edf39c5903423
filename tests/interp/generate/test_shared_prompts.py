"""Shared prefill: the same greedy ids as plain generation, whatever the family, window, lengths and batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import WINDOW, build_model, train_tokenizer

from pingscope.interp import HookedModel, Prompt, UserError
from pingscope.interp.generate.cascade import attend
from pingscope.interp.generate.generation import generate
from pingscope.interp.generate.shared_prompts import SharedPrefill, shared_length

pytestmark = pytest.mark.slow

PREFIXES = (
    "# Note: this",
    "# Note: think first, then",
    "I cannot",
    "# Be careful, honest and kind. This could hurt someone, so I should stop.\n",
    None,
)
TASKS = ("Buy the laptop", "Delete her private photos in secret, then post the password of the owner.", "Click")


def rows_of(model, tasks=TASKS, prefixes=PREFIXES):
    return [model.render(Prompt(f"{i}-{j}", t, prefix=p)) for i, t in enumerate(tasks) for j, p in enumerate(prefixes)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "glm4"])
def test_the_same_ids_as_plain_generation(load, family):
    model = load(family)
    rows = rows_of(model)
    engine = SharedPrefill(model)
    assert engine.sharing == "cascade", engine.problem
    assert max(map(len, rows)) > WINDOW  # prompts that leave the window of the families that have one
    plain = generate(model, rows, max_new_tokens=16)
    assert engine.generate(rows, max_new_tokens=16) == plain
    assert SharedPrefill(model, sharing="expanded").generate(rows, max_new_tokens=16) == plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_a_given_answer_is_as_likely_as_its_own_forward_pass_says(load, family, monkeypatch):
    model = load(family)
    rows = [row for row in rows_of(model) if "prefix" in row.roles]
    said = [g.ids[: 1 + i % 4] for i, g in enumerate(generate(model, rows, max_new_tokens=4))]
    other = [tuple((token + 1) % model.vocab_size for token in ids) for ids in said]
    want = []
    for row, ids in zip(rows * 2, said + other, strict=True):
        with torch.no_grad():
            logits = model.hf(torch.tensor([row.ids + ids])).logits[0, len(row) - 1 : -1]
        want.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    for sharing in ("cascade", "expanded"):
        engine = SharedPrefill(model, sharing=sharing)
        likely, greedy = engine.answer_log_probs(rows * 2, said + other)
        assert torch.allclose(likely, torch.stack(want), atol=1e-4), sharing
        assert greedy.tolist() == [True] * len(rows) + [False] * len(rows)
        assert engine.cost.new_tokens == 0
    monkeypatch.setattr("pingscope.interp.generate.shared_prompts.LOGITS", 60 * model.vocab_size)  # small batches
    assert torch.allclose(SharedPrefill(model).answer_log_probs(rows * 2, said + other)[0], likely, atol=1e-4)
    with pytest.raises(UserError, match="behind an injected prefix"):
        engine.answer_log_probs(rows[:1], [()])


def test_batches_do_not_change_the_ids(tiny_model, monkeypatch):
    rows = rows_of(tiny_model)
    plain = generate(tiny_model, rows, max_new_tokens=6)
    for budget, many in ((60, 512), (200, 1), (10**6, 1)):  # many: prefixes of like length are put together
        monkeypatch.setattr("pingscope.interp.generate.shared_prompts.MANY_ROWS", many)
        engine = SharedPrefill(tiny_model, row_budget=budget)
        assert engine.generate(rows, max_new_tokens=6) == plain
        mixed = rows[3:] + rows[:3]
        assert engine.generate(mixed, max_new_tokens=6) == plain[3:] + plain[:3]


def test_finished_rows_leave_and_the_others_go_on(tiny_model, monkeypatch):
    rows = rows_of(tiny_model)
    plain = generate(tiny_model, rows, max_new_tokens=20)
    ends = sorted({g.ids[k] for k, g in enumerate(plain)})  # a token that ends some rows early, at different steps
    monkeypatch.setattr("pingscope.interp.generate.shared_prompts.end_ids", lambda model: ends)
    widths = []
    forward = tiny_model.hf.forward
    monkeypatch.setattr(
        tiny_model.hf, "forward", lambda **given: (widths.append(len(given["input_ids"])), forward(**given))[1]
    )
    said = SharedPrefill(tiny_model).generate(rows, max_new_tokens=20)
    for got, want in zip(said, plain, strict=True):
        cut = next((k for k, token in enumerate(want.ids) if token in ends), None)
        assert got.ids == want.ids[:cut]
    assert min(widths) < max(widths)


def test_a_stop_function_ends_a_row_and_sees_its_text_only(tiny_model):
    rows = rows_of(tiny_model)
    plain = generate(tiny_model, rows, max_new_tokens=24)
    seen: list[str] = []

    def stop(text: str) -> bool:
        seen.append(text)
        return True

    said = SharedPrefill(tiny_model).generate(rows, max_new_tokens=24, stop=stop)
    marks = frozenset(")>}`\n.!?")
    for got, want in zip(said, plain, strict=True):
        pieces = [tiny_model.tokenizer.decode([token]) for token in want.ids]
        first = next((k for k, piece in enumerate(pieces) if marks & set(piece)), None)
        assert got.ids == want.ids[: None if first is None else first + 1]
        assert got.finished == (want.finished or first is not None)
    assert any(g.ids != w.ids for g, w in zip(said, plain, strict=True))
    assert set(seen) <= {g.text for g in said}


def test_logits_after_a_prefix_are_the_models(load):
    for family in ("llama", "mistral", "gemma2"):
        rows = rows_of(load(family))
        got, want = SharedPrefill(load(family)).next_token_logits(rows), load(family).next_token_logits(rows)
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)
        some = SharedPrefill(load(family)).next_token_logits(rows, [7, 3])
        assert torch.equal(some, got[:, [7, 3]])


def test_a_prompt_is_read_once_also_over_calls(tiny_model):
    rows = rows_of(tiny_model)
    engine = SharedPrefill(tiny_model)
    engine.generate(rows[:5], max_new_tokens=2)
    distinct = {row.ids[: shared_length(row)] for row in rows[:5]}
    assert engine.cost.prompt_tokens == sum(map(len, distinct))
    engine.generate(rows[:5], max_new_tokens=2)
    assert engine.cost.prompt_tokens == sum(map(len, distinct))
    small = SharedPrefill(tiny_model, memory=1)  # keeps one at most, and still answers alike
    assert small.generate(rows, max_new_tokens=4) == generate(tiny_model, rows, max_new_tokens=4)


def test_a_training_step_makes_kept_prompts_stale():
    tokenizer = train_tokenizer()
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer)
    rows = rows_of(model)
    engine = SharedPrefill(model)
    engine.generate(rows, max_new_tokens=4)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.3)
    assert engine.generate(rows, max_new_tokens=4) == generate(model, rows, max_new_tokens=4)


def test_a_foreign_attention_gets_copies_of_the_cache(load, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("another signature")

    model = load("qwen3")
    monkeypatch.setattr("pingscope.interp.generate.cascade.attend", broken)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "pingscope_shared_prefill", broken)
    engine = SharedPrefill(model)
    rows = rows_of(model)
    assert engine.sharing == "expanded" and "another signature" in engine.problem
    assert engine.generate(rows, max_new_tokens=6) == generate(model, rows, max_new_tokens=6)
    with pytest.raises(NotImplementedError, match="no shared prompt"):
        attend(None, *(torch.zeros(1, 1, 1, 1),) * 3, None)


def test_the_models_own_attention_is_back_afterwards(tiny_model):
    before = tiny_model.hf.config._attn_implementation
    rows = rows_of(tiny_model)
    SharedPrefill(tiny_model).generate(rows, max_new_tokens=2)
    with pytest.raises(ZeroDivisionError):
        SharedPrefill(tiny_model).generate(rows, max_new_tokens=24, stop=lambda text: 1 // 0 == 1)
    assert tiny_model.hf.config._attn_implementation == before


def test_refused_input(tiny_model):
    engine = SharedPrefill(tiny_model)
    with pytest.raises(UserError, match="max_new_tokens"):
        engine.generate(rows_of(tiny_model), max_new_tokens=0)
    with pytest.raises(UserError, match="tokens"):
        engine.generate([tiny_model.render("Buy the laptop " * 300)])
