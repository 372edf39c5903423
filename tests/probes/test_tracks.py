from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pingscope.probes.logistic import LayerProbes
from pingscope.probes.pooling import read_tokens
from pingscope.probes.tracks import VALUES_SCHEMA, by_role, curves, summarise, token_logits, token_rows, values_table

# Logit = 2 * state - 1. States are chosen so that every mean can be done in the head.
PROBES = LayerProbes((0,), np.array([[2.0]]), np.array([-1.0]))
PROMPTS = [
    ("a", "harmful", ["template", "instruction", "instruction", "header", "header"]),
    ("b", "harmful", ["template", *["instruction"] * 20, "header", "prefix", "response"]),
    ("c", "benign", ["template", "page", "header"]),
]
STATES = np.concatenate([[1, 2, 4, 5, 6], [1, *range(20), 7, 8, 9], [3, 2, 1]]).astype(np.float32)[:, None]


@pytest.fixture(params=["in order", "shuffled"])
def store(request, make_store):
    order = None if request.param == "in order" else np.random.default_rng(0).permutation(len(STATES))
    return make_store(PROMPTS, {0: STATES}, order)


def test_token_logits_follow_the_index(store) -> None:
    z = token_logits(store, PROBES, 0)
    rows = store.index.to_pylist()
    at = {(row["prompt_id"], row["position"]): value for row, value in zip(rows, z, strict=True)}
    assert at["a", 0] == 1 and at["b", 23] == 17 and at["c", 2] == 1


def test_roles_by_hand(store) -> None:
    found = summarise(by_role(read_tokens(store.index), token_logits(store, PROBES, 0)))
    harmful, benign = found["harmful"], found["benign"]
    assert harmful["instruction"].value == np.mean([2 * 3 - 1, 2 * 9.5 - 1]) and harmful["instruction"].n == 2
    assert harmful["header"].value == np.mean([10, 13])
    assert harmful["final"].value == np.mean([11, 15])  # a's last header token, b's prefix
    assert harmful["prompt"].value == pytest.approx(np.mean([2 * 18 / 5 - 1, 2 * 198 / 22 - 1]))
    assert (harmful["prefix"].value, harmful["prefix"].n, harmful["prefix"].n_missing) == (15, 1, 1)
    assert benign["page"].value == 3 and "instruction" not in benign and "prefix" not in benign


def test_curves_align_by_role_with_missing_never_zero(store) -> None:
    found = curves(read_tokens(store.index), token_logits(store, PROBES, 0))["harmful"]
    assert len({len(column) for column in found.values()}) == 1
    at = {
        (r, s): i
        for i, (r, by, s) in enumerate(zip(found["role"], found["by"], found["slot"], strict=True))
        if (r, by) != ("instruction", "index")
    }
    # Two tokens fall into tenths 2 and 7; of twenty every tenth has two.
    assert found["value"][at["instruction", 2]] == np.mean([3, 2 * 4.5 - 1]) and found["n"][at["instruction", 2]] == 2
    assert found["value"][at["instruction", 0]] == 0 and found["n"][at["instruction", 0]] == 1
    assert found["value"][at["header", 0]] == np.mean([9, 13]) and found["n"][at["header", 1]] == 1
    assert found["value"][at["header", 1]] == 11
    assert found["slots"][at["instruction", 0]] == 10 and found["slots"][at["header", 0]] == 2
    assert found["role"] == sorted(found["role"], key=["instruction", "template", "header", "prefix", "response"].index)
    assert found["low"][at["prefix", 0]] is None  # one prompt has no interval
    assert None not in found["value"]


def test_instructions_are_aligned_by_token_too(store) -> None:
    found = curves(read_tokens(store.index), token_logits(store, PROBES, 0))["harmful"]
    rows = [
        (s, slots, value, n)
        for role, by, s, slots, value, n in zip(
            *(found[name] for name in ("role", "by", "slot", "slots", "value", "n")), strict=True
        )
        if (role, by) == ("instruction", "index")
    ]
    # Prompt a has two tokens (3 and 7), prompt b twenty (-1, 1, 3, …): beyond the second only b is there.
    assert rows[:3] == [(0, 20, np.mean([3, -1]), 2), (1, 20, np.mean([7, 1]), 2), (2, 20, 3.0, 1)]
    assert len(rows) == 20 and rows[-1] == (19, 20, 37.0, 1)


def test_the_gap_is_taken_where_both_kinds_have_tokens(store) -> None:
    found = curves(read_tokens(store.index), token_logits(store, PROBES, 0))["gap"]
    assert list(zip(found["role"], found["slot"], found["value"], found["n"], strict=True)) == [
        ("template", 0, 1.0 - 5.0, 3),
        ("header", 0, np.mean([9, 13]) - 1.0, 3),
    ]
    assert found["low"] == [None, None]  # one benign prompt


def test_values_table_has_one_row_per_prompt_and_role_it_has(store) -> None:
    table = values_table("agent", -1, by_role(read_tokens(store.index), token_logits(store, PROBES, 0)))
    assert table.schema == VALUES_SCHEMA
    rows = {(row["prompt_id"], row["role"]): row for row in table.to_pylist()}
    assert len(rows) == len(table) == 5 + 7 + 5
    assert rows["b", "instruction"] == {
        "arm": "agent", "layer": -1, "prompt_id": "b", "label": "harmful", "role": "instruction",
        "logit": 18.0, "n_tokens": 20,
    }  # fmt: skip
    assert ("c", "instruction") not in rows
    assert pa.types.is_float64(table.schema.field("logit").type)


def test_token_rows_are_in_reading_order(store) -> None:
    (row,) = token_rows(store, PROBES, ["a"], [0])
    assert row["tokens"] == ["t0", "t1", "t2", "t3", "t4"] and row["roles"] == PROMPTS[0][2]
    assert row["logits"] == {0: [1.0, 3.0, 7.0, 9.0, 11.0]} and (row["id"], row["label"]) == ("a", "harmful")
