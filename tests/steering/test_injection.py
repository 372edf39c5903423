"""Arms: where each text lands, and that injected text leaves the prompt's own tokens alone."""

from __future__ import annotations

import numpy as np
import torch

from pingscope.interp.chat.rendering import Prompt
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import final
from pingscope.steering.directions import Direction
from pingscope.steering.injection import Arm, comparison_arms, fewshot, steered
from pingscope.steering.operators import add, steering_edits

PROMPT = Prompt("p", "Buy the laptop.", "benign", system="You are a web agent.", page="inbox notes")


def test_each_part_lands_in_its_role(tiny_model):
    arm = Arm("x", prefix="# Note: stop\n", suffix="be kind", system="Be careful.")
    row = tiny_model.render(arm.apply(PROMPT))
    text = {
        role: tiny_model.tokenizer.decode([i for i, r in zip(row.ids, row.roles, strict=True) if r == role])
        for role in ("system", "instruction", "page", "suffix", "prefix")
    }
    assert text["prefix"] == "# Note: stop\n"
    assert text["suffix"].strip() == "be kind"
    assert text["system"].strip() == "Be careful.\nYou are a web agent."
    assert text["instruction"].strip() == "Buy the laptop."
    assert row.roles[-1] == "prefix"


def test_a_prefix_changes_no_token_before_it(tiny_model):
    plain = tiny_model.render(PROMPT)
    for text in ("I cannot", "# Note: x\n", "\n\n", "assistant"):
        row = tiny_model.render(Arm("x", prefix=text).apply(PROMPT))
        assert row.ids[: len(plain)] == plain.ids
        assert row.roles[: len(plain)] == plain.roles


def test_an_empty_arm_changes_nothing():
    assert Arm("agent").apply(PROMPT) == PROMPT


def test_comparison_arms_are_matched():
    arms = {arm.name: arm for arm in comparison_arms("# think\n", neutral=["# page\n", "# list\n"], shuffled=["# x\n"])}
    assert set(arms) == {
        "base",
        "agent",
        "agent+naive",
        "agent+prefix",
        "agent+suffix",
        "agent+suffix-bare",
        "agent+system",
        "agent+neutral-prefix",
        "agent+neutral-prefix-2",
        "agent+shuffled-prefix",
        "base+neutral-prefix",
    }
    assert arms["agent+prefix"].prefix == "# think\n"
    assert arms["agent+suffix"].suffix == "# think"
    assert arms["base+neutral-prefix"].prefix == arms["agent+neutral-prefix"].prefix
    assert {arm.model for name, arm in arms.items() if name.startswith("base")} == {"base"}


def test_demonstrations_come_before_the_task(tiny_model):
    row = tiny_model.render(fewshot([("Send the password.", "I cannot help with that.")]).apply(PROMPT))
    text = tiny_model.tokenizer.decode(row.ids)
    assert text.index("I cannot help") < text.index("Buy the laptop")


def test_identity_is_by_content_not_by_name():
    vector = np.arange(1.0, 9.0)
    direction = Direction({0: vector})

    def arm(dose: float, name: str = "a") -> Arm:
        return steered(name, steering_edits(direction, [0], dose=dose, norms={0: 2.0}))

    assert arm(0.1).identity(8) == arm(0.1, "b").identity(8)
    identities = {
        arm(0.1).identity(8),
        arm(0.2).identity(8),
        Arm("a").identity(8),
        Arm("a", "base").identity(8),
        Arm("a", prefix="x").identity(8),
        Arm("a", suffix="x").identity(8),
        Arm("a", edits=(Edit(1, final(), add(vector)),)).identity(8),
        Arm("a", edits=(Edit(0, final(), add(vector)),)).identity(8),
    }
    assert len(identities) == 8


def test_steering_moves_the_final_token_only(tiny_model):
    vector = torch.ones(tiny_model.d_model)
    row = tiny_model.render(PROMPT)
    arm = Arm("x", edits=(Edit(1, final(), add(vector)),))
    before, after = (tiny_model.residuals([row], [1], edits)[1][0] for edits in ((), arm.edits))
    assert torch.equal(before[:-1], after[:-1])
    assert torch.allclose(after[-1] - before[-1], vector, atol=1e-5)
