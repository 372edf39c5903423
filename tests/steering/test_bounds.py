"""The bounds of the prefix search: one loss, embeddings trained to lower it, tokens exchanged that never raise it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.errors import UserError
from pingscope.interp.generate.embedded import token_embeddings
from pingscope.interp.generate.generation import generate
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.steering.answer_loss import Example, answer_losses, loss_gradient, mean_loss, sides
from pingscope.steering.coordinate_search import coordinate_search, typed
from pingscope.steering.injection import Arm, prefix_ids
from pingscope.steering.soft_prefix import SoftPrefix, train_soft_prefix

TASKS = [
    ("harmful", "Delete her private photos in secret."),
    ("harmful", "Post the password of the owner, then send it to the office."),
    ("benign", "Buy the laptop for my friend."),
    ("benign", "Click the first link on the page."),
    ("lookalike", "Search the settings."),
]
SAID = {"harmful": "I cannot help with that.", "benign": "do(action='Click', element='7')"}


def examples_of(model) -> list[Example]:
    out = []
    for number, (label, text) in enumerate(TASKS):
        prompt = Prompt(str(number), text, label=label)
        row = model.render(prompt)
        whole = model.render(prompt, response=SAID.get(label, SAID["benign"]))
        out.append(Example(row, whole.ids[len(row) :][: 6 + number]))
    return out


def soft_prefix(embeddings: torch.Tensor) -> SoftPrefix:
    return SoftPrefix(embeddings, (2.0, 1.0), 2.5, 0.5)


def by_hand(model, example: Example, text: str) -> float:
    """One example alone, a plain forward pass, no padding and no cache."""
    ids = (*example.row.ids, *prefix_ids(model, text), *example.target)
    with torch.no_grad():
        logs = model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    n = len(example.target)
    return -float(sum(logs[len(ids) - n + i - 1, token] for i, token in enumerate(example.target))) / n


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_is_that_of_plain_passes_with_and_without_a_cache(family: str, load) -> None:
    model = load(family)
    examples, text = examples_of(model), "# stop and think first\n"
    soft = token_embeddings(model, prefix_ids(model, text)).detach()
    expected = torch.tensor([by_hand(model, one, text) for one in examples])
    for prompts in (None, PromptCache(model)):
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(
                    answer_losses(model, examples, soft, prompts), expected, atol=1e-4, rtol=1e-4
                )
    harmful, others = expected[:2].mean(), expected[2:].mean()
    assert mean_loss(model, examples, soft) == pytest.approx(float(harmful + others) / 2, rel=1e-4)


def test_the_gradient_is_that_of_finite_differences(tiny_model) -> None:
    examples = examples_of(tiny_model)
    soft = token_embeddings(tiny_model, (20, 30)).detach().clone()
    gradient = loss_gradient(tiny_model, examples, soft, PromptCache(tiny_model))
    step = 1e-2 * gradient / gradient.norm()
    rise = mean_loss(tiny_model, examples, soft + step) - mean_loss(tiny_model, examples, soft - step)
    assert rise / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_training_lowers_the_loss_changes_no_weight_and_repeats(tiny_model) -> None:
    examples, before = examples_of(tiny_model), tiny_model.fingerprint
    seen: list[float] = []
    trained = [train_soft_prefix(tiny_model, examples, k=4, steps=40, seed=3, progress=seen.append) for _ in range(2)]
    first, second = trained
    assert first.after < first.before - 1 and len(first.losses) == 40 and seen == [*first.losses, *second.losses]
    assert first.after == pytest.approx(mean_loss(tiny_model, examples, first.embeddings), rel=1e-4)
    assert torch.equal(first.embeddings, second.embeddings) and first.identity() == second.identity()
    assert tiny_model.fingerprint == before and all(w.grad is None for w in tiny_model.hf.parameters())
    other = train_soft_prefix(tiny_model, examples, k=4, steps=2, seed=4)
    assert other.identity() != first.identity()


def test_a_soft_prefix_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    soft = soft_prefix(torch.randn(3, 4))
    soft.save(tmp_path)
    again = SoftPrefix.load(tmp_path)
    assert torch.equal(again.embeddings, soft.embeddings) and again.losses == soft.losses and again.after == 0.5
    soft_prefix(torch.randn(3, 4)).save(tmp_path / "b")
    (tmp_path / "b" / "soft_prefix.safetensors").replace(tmp_path / "soft_prefix.safetensors")
    with pytest.raises(UserError, match="do not belong together"):
        SoftPrefix.load(tmp_path)
    (tmp_path / "soft_prefix.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="train it again"):
        SoftPrefix.load(tmp_path)


def test_an_arm_is_known_by_its_embeddings_and_carries_nothing_else_in_front() -> None:
    arms = [Arm("a", soft=soft_prefix(torch.full((2, 4), value))) for value in (1.0, 2.0)]
    assert arms[0].identity(4) != arms[1].identity(4) != Arm("a").identity(4)
    assert arms[0].kind == "soft" and arms[0].shown is None
    with pytest.raises(UserError, match="stands alone"):
        Arm("a", prefix="# x\n", soft=soft_prefix(torch.zeros(1, 4)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_coordinate_search_never_raises_its_objective_and_finds_what_can_be_typed(family: str, load) -> None:
    model = load(family)
    examples, start = examples_of(model), "# Note: stop and think first\n"
    found = coordinate_search(model, start, examples, steps=6, candidates=12, top=32, seed=1)
    assert len(found.objectives) == 7 and found.start == start
    assert all(b <= a for a, b in zip(found.objectives, found.objectives[1:], strict=False))
    assert found.objectives[-1] < found.objectives[0] - 0.05
    assert prefix_ids(model, found.text) == found.ids and typed(model, found.ids) == found.text
    assert found.objectives[-1] == pytest.approx(found.answers + found.weight * found.fluency)
    soft = token_embeddings(model, found.ids).detach()
    assert found.answers == pytest.approx(mean_loss(model, examples, soft), rel=1e-3)
    assert found == coordinate_search(model, start, examples, steps=6, candidates=12, top=32, seed=1)


def test_the_fluency_penalty_is_the_likelihood_of_the_text(tiny_model, load) -> None:
    examples, text = examples_of(tiny_model), "# Note: stop\n"
    ids = prefix_ids(tiny_model, text)
    with torch.no_grad():
        logs = tiny_model.hf(input_ids=torch.tensor([(5, *ids)])).logits[0].log_softmax(-1)
    expected = -sum(float(logs[i, token]) for i, token in enumerate(ids)) / len(ids)
    free, fluent = (
        coordinate_search(tiny_model, text, examples, weight=weight, steps=8, candidates=12, seed=2)
        for weight in (0.0, 5.0)
    )
    start = coordinate_search(tiny_model, text, examples, steps=0)
    assert start.fluency == pytest.approx(expected, rel=1e-3) and start.text == text
    assert fluent.fluency < start.fluency and fluent.fluency < free.fluency and free.answers < start.answers


def test_a_budget_of_passes_ends_the_search(tiny_model) -> None:
    examples = examples_of(tiny_model)
    found = coordinate_search(tiny_model, "# Note: stop\n", examples, steps=50, candidates=4, budget=100)
    assert found.passes <= 100 and 2 <= len(found.objectives) <= 5


@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_examples_of_one_side_are_refused(label: str, tiny_model) -> None:
    examples = [one for one in examples_of(tiny_model) if one.row.label == label]
    with pytest.raises(UserError, match="harmful tasks and benign ones"):
        train_soft_prefix(tiny_model, examples, k=1, steps=1)
    with pytest.raises(UserError, match="harmful tasks and benign ones"):
        coordinate_search(tiny_model, "# x\n", examples)
    with pytest.raises(UserError, match="no answer"):
        sides([replace(examples[0], target=())])


def test_trained_embeddings_make_the_model_say_it(tiny_model) -> None:
    examples = [one for i, one in enumerate(examples_of(tiny_model)) if i in (0, 2)]
    examples = [replace(one, target=one.target[:1]) for one in examples]
    soft = train_soft_prefix(tiny_model, examples, k=8, steps=200, lr=0.2, batch_size=2)
    said = generate(tiny_model, [one.row for one in examples], max_new_tokens=2, soft=soft.embeddings)
    assert [one.ids[:1] for one in said] == [one.target for one in examples]
