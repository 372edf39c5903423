from __future__ import annotations

import numpy as np
import pytest

from pingscope.interp.errors import UserError
from pingscope.probes import pooling
from pingscope.probes.pooling import join, pool, pool_rows

PROMPTS = [
    ("a", "harmful", ["template", "instruction", "instruction", "header", "header"]),
    ("b", "benign", ["system", "template", "instruction", "page", "header", "prefix", "response"]),
    ("c", "benign", ["template", "page", "header"]),
]
STATES = np.random.default_rng(0).standard_normal((15, 4)).astype(np.float32)


def by_hand(pooling_name: str) -> np.ndarray:
    a, b, c = STATES[:5], STATES[5:12], STATES[12:]
    return {
        "mean_prompt": np.stack([a.mean(0), b[:5].mean(0), c.mean(0)]),
        "mean_instruction": np.stack([a[1:3].mean(0), b[2], np.full(4, np.nan)]),
        "final": np.stack([a[4], b[5], c[2]]),
    }[pooling_name]


@pytest.mark.parametrize("name", pooling.POOLINGS)
def test_pooling_by_hand_whatever_the_order_and_the_block(name, make_store, monkeypatch) -> None:
    for size in (64 << 20, 40):  # 40 bytes: one row a block
        monkeypatch.setattr(pooling, "_BLOCK_BYTES", size)
        for order in (None, np.random.default_rng(1).permutation(15)):
            found = pool(make_store(PROMPTS, {2: STATES}, order), name)
            at = [found.prompt_ids.index(prompt) for prompt, *_ in PROMPTS]
            np.testing.assert_allclose(found.features[2][at], by_hand(name), rtol=1e-6)
            assert [found.labels[i] for i in at] == ["harmful", "benign", "benign"]
            assert [bool(found.present[i]) for i in at] == [True, True, name != "mean_instruction"]


def test_sums_are_float64(make_store) -> None:
    states = np.full((4000, 1), 1.0, np.float32)
    states[0] = 2.0**24  # in float32 every further 1 would be lost
    found = pool(make_store([("a", "benign", ["instruction"] * 4000)], {0: states}), "mean_prompt")
    assert found.features[0][0, 0] == (2.0**24 + 3999) / 4000


def test_memory_and_store_agree(tiny_model, tmp_path) -> None:
    from pingscope.interp.chat.rendering import Prompt
    from pingscope.interp.store.extraction import extract

    prompts = [Prompt(f"p{i}", "buy the laptop " * (i + 1), "benign", prefix="# Note" * (i % 2)) for i in range(5)]
    rows = [tiny_model.render(prompt) for prompt in prompts]
    store = extract(tiny_model, rows, tmp_path / "s", layers=[0, 3])
    residuals = tiny_model.residuals(rows, [0, 3])
    for name in pooling.POOLINGS:
        kept, live = pool(store, name), pool_rows(rows, residuals, name)
        split = join([pool_rows([row], {l: [r[i]] for l, r in residuals.items()}, name) for i, row in enumerate(rows)])
        assert kept.prompt_ids == live.prompt_ids == split.prompt_ids
        for layer in (0, 3):
            np.testing.assert_allclose(kept.features[layer], live.features[layer], atol=1e-5)
            np.testing.assert_array_equal(split.features[layer], live.features[layer])
    final = pool_rows(rows, residuals, "final").features[3]
    np.testing.assert_allclose(final, [r[row.final].numpy() for row, r in zip(rows, residuals[3], strict=True)])


def test_bad_input_is_named(make_store) -> None:
    broken = STATES.copy()
    broken[6, 1] = np.inf
    with pytest.raises(UserError, match=r"layer 2 .* prompt 'b'"):
        pool(make_store(PROMPTS, {2: broken}), "mean_prompt")
    with pytest.raises(UserError, match="unknown 'median'"):
        pool(make_store(PROMPTS, {2: STATES}), "median")


def test_any_selection_can_be_pooled(make_store) -> None:
    store = make_store(PROMPTS, {2: STATES}, np.random.default_rng(1).permutation(15))
    named = {"mean:final": "final", "mean:role:instruction": "mean_instruction"}
    for selection, name in named.items():
        np.testing.assert_allclose(pool(store, selection).features[2], pool(store, name).features[2])
    largest = pool(store, "max:role:instruction")
    rows = np.split(STATES, np.cumsum([len(roles) for *_, roles in PROMPTS])[:-1])
    for (prompt, _, roles), states in zip(PROMPTS, rows, strict=True):
        own = states[np.array(roles) == "instruction"]
        wanted = own.max(0) if len(own) else np.full(STATES.shape[1], np.nan)
        found = largest.features[2][largest.prompt_ids.index(prompt)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_an_unknown_pooling_is_named(make_store) -> None:
    store = make_store(PROMPTS, {2: STATES})
    for wrong in ("median", "mean:role:nobody"):
        with pytest.raises(UserError):
            pool(store, wrong)
