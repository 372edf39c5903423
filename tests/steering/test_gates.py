"""Gates: thresholds with a stated rate, decisions by row, edits on exactly the tokens of open rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pingscope.interp import Edit, Prompt, UserError, edit
from pingscope.interp.files import read_json, write_json
from pingscope.interp.generate.generation import GatedPrefix, generate
from pingscope.interp.model.selection import final, generated, parse, prompt, role
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.decisions import GateSession
from pingscope.steering.gates import (
    Gate,
    GateWatch,
    calibrate,
    calibrate_f1,
    cast_direction,
    cast_score,
    from_probe,
    gated,
    logit_score,
)
from pingscope.steering.injection import prefix_ids
from tests.interp.model.test_hooks import NEW, Oracle, bump, expected, hook_count, rows_of

D = 64


def gate_for(model, rows, layer=1, where=None, pooling="last", **changes) -> Gate:
    """A gate in a random direction whose threshold lies between the rows' scores: some open, some do not."""
    direction = np.random.default_rng(0).standard_normal(model.d_model)
    gate = Gate(layer, where or final(), direction, pooling=pooling, model=model.fingerprint)
    scores = sorted(decided(model, rows, gate).values())
    return replace(gate, threshold=(scores[0] + scores[1]) / 2, **changes)


def decided(model, rows, gate) -> dict[str, float]:
    session = GateSession(gate)
    model.residuals(rows, "all", gated([Edit(gate.layer, gate.where, lambda x: x)], session))
    return {one.row: one.score for one in session.decisions}


# --- thresholds


def test_the_threshold_is_a_conservative_order_statistic():
    gate = Gate(0, final(), np.ones(4))
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    at_largest = calibrate(gate, scores)
    assert at_largest.threshold == 99.0
    assert (at_largest.point.fpr, at_largest.point.n, at_largest.point.observed) == (0.01, 99, 0)
    assert calibrate(gate, np.arange(1.0, 200.0)).threshold == 198.0  # k = 2 of 199
    assert calibrate(gate, np.arange(1.0, 200.0)).point.observed == 1
    assert calibrate(gate, np.arange(1.0, 11.0), fpr=0.1).threshold == 10.0
    tied = calibrate(gate, [0.0] * 50 + [1.0] * 50)
    assert tied.point.observed == 0  # above, never at, the threshold
    with pytest.raises(UserError, match=r"98 benign scores cannot state .* at least 99"):
        calibrate(gate, scores[:98])
    with pytest.raises(UserError, match="not finite"):
        calibrate(gate, [*scores, math.nan])
    with pytest.raises(UserError, match="between 0 and 1"):
        calibrate(gate, scores, fpr=1.0)


def test_the_stated_rate_holds_for_new_prompts():
    rng, gate = np.random.default_rng(1), Gate(0, final(), np.ones(4))
    for n in (99, 150, 199):
        rates = [1 - calibrate(gate, rng.uniform(size=n)).threshold for _ in range(1500)]
        assert np.mean(rates) == pytest.approx(math.floor(0.01 * (n + 1)) / (n + 1), rel=0.1)
        assert np.mean(rates) <= 0.01 * 1.1


def test_f1_finds_threshold_and_sign():
    gate = Gate(0, prompt(), np.ones(4), rule="cast", pooling="mean")
    found = calibrate_f1(gate, harmful=[0.1, 0.2, 0.3], benign=[0.5, 0.6, 0.25])
    assert (found.sign, found.point.method, found.point.fpr) == (-1, "F1", None)
    assert -0.5 < found.threshold < -0.3 and found.meta["f1"] == pytest.approx(6 / 7)
    assert calibrate_f1(gate, [2.0, 3.0], [0.0, 1.0]).threshold == 1.5


# --- scores


def test_scores_of_a_row_do_not_depend_on_the_others():
    gate = Gate(0, final(), np.random.default_rng(0).standard_normal(D), 0.3)
    x = torch.randn(257, D)
    together = gate.score(x)
    assert all(torch.equal(gate.score(x[i : i + 1])[0], together[i]) for i in range(0, 257, 16))
    wanted = x.double() @ torch.as_tensor(gate.direction) + 0.3
    assert torch.allclose(together, wanted)
    assert torch.equal(replace(gate, sign=-1).score(x), -together)


def test_cast_score_is_its_formula():
    x, c = torch.randn(9, D).double(), torch.randn(D).double()
    projection = torch.outer(c, c) / (c @ c)
    wanted = torch.nn.functional.cosine_similarity(x, torch.tanh(x @ projection.T), dim=-1)
    assert torch.allclose(cast_score(x, c, 0.0), wanted)
    assert torch.allclose(cast_score(x, -3 * c, 0.0), wanted)
    assert torch.allclose(logit_score(x, c, 1.5), x @ c + 1.5)


def test_cast_direction_is_the_axis_of_the_pairs():
    rng = np.random.default_rng(0)
    axis = rng.standard_normal(D)
    axis /= np.linalg.norm(axis)
    shared = rng.standard_normal((40, D)) * 5
    found = cast_direction(shared + 3 * axis + rng.standard_normal((40, D)) * 0.1, shared - 3 * axis)
    assert found @ axis > 0.99


# --- decisions within the pass


@pytest.mark.parametrize("where", ["final", "prompt", "role:instruction"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_gate_reads_what_the_model_computes(tiny_model, where, pooling):
    rows = rows_of(tiny_model)
    gate = gate_for(tiny_model, rows, 2, parse(where), pooling)
    states = tiny_model.residuals(rows, 2)[2]
    for row, x in zip(rows, states, strict=True):
        chosen = x[torch.tensor(gate.where.mask(row))].double()
        pooled = chosen[-1] if pooling == "last" else chosen.mean(0)
        assert decided(tiny_model, rows, gate)[row.id] == pytest.approx(float(gate.score(pooled[None])[0]), rel=1e-4)


@pytest.mark.parametrize("text", ["final", "prompt", "final | generated[0:]", "generated[1:3]", "role:prefix,header"])
@pytest.mark.parametrize("mode", ["cache", "no_cache", "chunked"])
def test_gated_edits_touch_exactly_the_tokens_of_open_rows(tiny_model, mode, text):
    model, where = tiny_model, parse(text)
    rows = rows_of(model)
    gate = gate_for(model, rows)
    opened = {i for i, row in enumerate(rows) if decided(model, rows, gate)[row.id] > gate.threshold}
    assert 0 < len(opened) < len(rows)
    batch = model.batch(rows, side="left")
    pads = [batch.ids.shape[1] - len(row) for row in rows]
    options = {"cache": {}, "no_cache": {"use_cache": False}, "chunked": {"prefill_chunk_size": 4}}[mode]

    def run():
        edits = gated([Edit(1, where, bump)], gate)
        with edit(model, rows, edits, NEW - 1), Oracle(model, 1, pads, mode != "no_cache") as oracle:
            oracle.handles[0].remove()
            oracle.handles[0] = model.blocks[1].register_forward_hook(oracle.remember, prepend=True)
            model.hf.generate(
                batch.ids, attention_mask=batch.mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
            )
        return oracle

    if mode == "chunked" and text in ("prompt", "role:prefix,header"):
        with pytest.raises(UserError, match="passed before the gate had read"):
            run()
        return
    assert set(run().touched) == {(i, position) for i, position in expected(rows, where, NEW) if i in opened}


def test_a_closed_gate_changes_nothing_and_an_open_one_everything(tiny_model):
    rows = rows_of(tiny_model)
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 30
    edits = [Edit(layer, parse("final | generated[0:]"), lambda x: x + vector) for layer in (1, 2)]
    gate = Gate(1, final(), np.ones(D))  # never calibrated: its threshold is infinite
    plain, steered = (generate(tiny_model, rows, max_new_tokens=6, edits=e) for e in ((), edits))
    assert generate(tiny_model, rows, max_new_tokens=6, edits=gated(edits, gate)) == plain != steered
    gate = replace(gate, threshold=-math.inf)
    assert generate(tiny_model, rows, max_new_tokens=6, edits=gated(edits, gate)) == steered


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_rows_are_decided_alone(load, family):
    """In a batch every row does what it does alone: open ones as steered, closed ones as plain."""
    model = load(family)
    rows = rows_of(model)
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 30
    edits = [Edit(2, final(), lambda x: x + vector)]
    gate = gate_for(model, rows)
    together = generate(model, rows, max_new_tokens=6, edits=gated(edits, gate))
    plain, steered = (generate(model, rows, max_new_tokens=6, edits=e) for e in ((), edits))
    scores = decided(model, rows, gate)
    assert together == [
        (b if scores[row.id] > gate.threshold else a) for row, a, b in zip(rows, plain, steered, strict=True)
    ]


def test_nothing_is_open_before_the_evidence():
    rows = rows_like(3)
    watch = GateWatch(replace(Gate(0, prompt(), np.ones(4)), threshold=-math.inf), rows, was_open=[True] * 3)
    everywhere = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    assert not watch.opened.any()
    watch.see(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.ones(3, 4))
    assert not watch.opened.any()
    watch.see(torch.tensor([0, 0, 0]), torch.tensor([2, 3, 4]), torch.ones(3, 4))
    assert watch.opened.tolist() == [True, False, False]
    assert watch.open(*everywhere).view(3, 5).all(-1).tolist() == [True, False, False]


def rows_like(n: int, width: int = 5):
    from pingscope.interp import Rendered

    return [Rendered(f"r{i}", "", tuple(range(width)), ("instruction",) * width) for i in range(n)]


def test_streaming_decides_at_every_generated_token():
    gate = Gate(0, parse("final | generated[0:]"), np.array([1.0, 0, 0, 0]), threshold=0.5, release=-0.5)
    watch = GateWatch(gate, rows_like(1))
    scores = [0.0, 1.0, 0.0, -1.0, 0.0, 1.0]  # at positions 4 … 9
    for i, score in enumerate(scores):
        watch.see(torch.tensor([0]), torch.tensor([4 + i]), torch.tensor([[score, 0, 0, 0]]))
    positions = torch.arange(3, 12)
    flags = watch.open(torch.zeros(9, dtype=torch.long), positions)
    # closed until it fires; open through the small dip (hysteresis), not through the large one
    assert flags.tolist() == [False, False, True, True, False, False, True, True, True]
    watch.see(torch.tensor([0, 0]), torch.tensor([5, 6]), torch.full((2, 4), 9.0))  # read before: no new evidence
    assert watch.open(torch.zeros(9, dtype=torch.long), positions).tolist() == flags.tolist()


def test_streaming_is_the_same_with_and_without_cache(tiny_model):
    rows = rows_of(tiny_model)
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 30
    gate = gate_for(tiny_model, rows, where=parse("final | generated[0:]"))
    answers, logs = [], []
    for cached in (True, False):
        session = GateSession(gate)
        edits = gated([Edit(2, generated(), lambda x: x + vector)], session)
        answers.append(generate(tiny_model, rows, max_new_tokens=6, edits=edits, use_cache=cached))
        logs.append({(one.row, one.position): (round(one.score, 3), one.open) for one in session.decisions})
    assert answers[0] == answers[1]
    assert logs[0] == logs[1] and len(logs[0]) > len(rows)


def test_hysteresis_over_the_steps_of_an_episode(tiny_model):
    rows = rows_of(tiny_model)
    gate = gate_for(tiny_model, rows)
    scores = decided(tiny_model, rows, gate)
    up = max(scores, key=lambda name: scores[name])
    # Between steps nothing changes but the threshold: what was open stays open above the release alone.
    tight = replace(gate, threshold=scores[up] + 1, release=scores[up] - 1)
    for was_open in (True, False):
        watch = GateWatch(tight, rows, [was_open and row.id == up for row in rows])
        states = tiny_model.residuals(rows, gate.layer, where=final())[gate.layer]
        for i, (row, x) in enumerate(zip(rows, states, strict=True)):
            watch.see(torch.tensor([i]), torch.tensor([len(row) - 1]), x)
        assert watch.opened.tolist() == [was_open and row.id == up for row in rows]


# --- placement and faults


def test_placements_that_cannot_act_in_one_pass_are_refused(tiny_model):
    rows, gate = rows_of(tiny_model), Gate(2, final(), np.ones(D))
    streaming = Gate(2, parse("final | generated[0:]"), np.ones(D))

    def run(layer, where, when, part="residual"):
        generate(tiny_model, rows, max_new_tokens=3, edits=gated([Edit(layer, where, lambda x: x, part)], when))

    run(2, final(), gate)
    run(3, prompt(), gate)
    run(0, generated(), gate)
    for layer, where, when, part in (
        (1, final(), gate, "residual"),
        (2, final(), gate, "mlp"),
        (1, generated(), streaming, "residual"),
    ):
        with pytest.raises(UserError, match="its gate reads layer 2 and cannot act below it"):
            run(layer, where, when, part)
    with pytest.raises(UserError, match="its gate reads 'role:page', which matches no token"):
        run(3, final(), Gate(2, role("page"), np.ones(D)))


def test_gates_leave_no_hook_behind_and_the_users_stay(tiny_model):
    rows, calls = rows_of(tiny_model), []
    before = hook_count(tiny_model)  # other libraries leave theirs on a model that they share
    mine = tiny_model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    try:
        gate = replace(gate_for(tiny_model, rows), threshold=-math.inf)

        def broken(x):
            raise ValueError("from the user's function")

        with pytest.raises(ValueError, match="the user's function"):
            generate(tiny_model, rows, max_new_tokens=2, edits=gated([Edit(2, final(), broken)], gate))
        assert hook_count(tiny_model) == before + 1 and calls
    finally:
        mine.remove()


def test_a_score_that_is_no_number_is_an_error(tiny_model):
    rows = rows_of(tiny_model)
    spoil = Edit(0, final(), lambda x: x * math.nan)
    with pytest.raises(UserError, match="not finite"):
        generate(
            tiny_model,
            rows,
            max_new_tokens=1,
            edits=[spoil, *gated([Edit(2, final(), bump)], Gate(1, final(), np.ones(D)))],
        )


def test_saved_gates_are_exact_and_checked(tmp_path):
    gate = calibrate(
        Gate(3, parse("final | generated[0:]"), np.random.default_rng(0).standard_normal(8), 0.1), np.arange(99.0)
    )
    gate = replace(gate, release=gate.threshold - 0.1, probe="p", model="m")
    gate.save(tmp_path / "gate.json")
    loaded = Gate.load(tmp_path / "gate.json")
    assert loaded.identity() == gate.identity() and loaded.point == gate.point
    assert np.array_equal(loaded.direction, gate.direction)
    row = read_json(tmp_path / "gate.json")
    write_json(tmp_path / "gate.json", row | {"threshold": (98.5).hex()})
    with pytest.raises(UserError, match="do not match its identity"):
        Gate.load(tmp_path / "gate.json")
    with pytest.raises(UserError, match="not a saved gate"):
        Gate.from_dict({})
    loaded.check_model("m")
    with pytest.raises(UserError, match="calibrate it on this model"):
        loaded.check_model("another")


def test_bad_gates_are_refused():
    for direction in (np.zeros(4), np.array([1.0, math.nan]), np.ones((2, 2))):
        with pytest.raises((UserError, TypeError)):
            Gate(0, final(), direction)
    with pytest.raises(UserError, match="release"):
        Gate(0, final(), np.ones(4), threshold=1.0, release=2.0)
    probes = LayerProbes((1,), np.ones((1, 4)), np.zeros(1))
    assert from_probe(probes, 1, final(), "last", "m").threshold == math.inf
    with pytest.raises(UserError, match="no probe for layer 2"):
        from_probe(probes, 2, final(), "last", "m")


# --- gated prefix


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_gated_prefix_reads_the_prompt_once_and_answers_as_if_it_had_stood_there(load, family):
    model = load(family)
    rows = [row for row in rows_of(model) if "prefix" not in row.roles]
    gate = gate_for(model, rows)
    scores = decided(model, rows, gate)
    ids = prefix_ids(model, "# Is this safe? Let me think.\n")
    texts = ["Click the first link.", "Buy"]
    with_prefix = [
        model.render(Prompt(row.id, text), prefix="# Is this safe? Let me think.\n")
        for row, text in zip(rows, texts, strict=True)
    ]
    assert all(long.ids == row.ids + ids for long, row in zip(with_prefix, rows, strict=True))
    widths = []
    spy = model.base.register_forward_pre_hook(
        lambda m, a, k: widths.append((k.get("input_ids", a[0] if a else None)).shape[1]), with_kwargs=True
    )
    try:
        got = generate(model, rows, max_new_tokens=6, prefix=GatedPrefix(gate, ids))
    finally:
        spy.remove()
    assert widths[0] == max(map(len, rows)) and set(widths[1:]) == {1}  # one prefill, then a token a step
    plain, prefixed = (generate(model, which, max_new_tokens=6) for which in (rows, with_prefix))
    opened = [scores[row.id] > gate.threshold for row in rows]
    assert sorted(opened) == [False, True]
    assert got == [(b if flag else a) for flag, a, b in zip(opened, plain, prefixed, strict=True)]


def test_a_gated_prefix_needs_a_gate_on_the_prompt(tiny_model):
    rows = rows_of(tiny_model)
    streaming = Gate(2, parse("final | generated[0:]"), np.ones(D))
    with pytest.raises(UserError, match="decide on the prompt alone"):
        generate(tiny_model, rows, max_new_tokens=2, prefix=GatedPrefix(streaming, (5,)))
    with pytest.raises(UserError, match="greedy decoding"):
        generate(
            tiny_model, rows, max_new_tokens=2, temperature=1.0, prefix=GatedPrefix(Gate(2, final(), np.ones(D)), (5,))
        )


def test_answers_given_token_by_token_are_read_as_when_they_were_said(tiny_model):
    rows = rows_of(tiny_model)
    gate = gate_for(tiny_model, rows, where=parse("final | generated[0:]"))
    read = Edit(gate.layer, gate.where, lambda x: x)
    first, again = GateSession(gate), GateSession(gate)
    answers = generate(tiny_model, rows, max_new_tokens=6, edits=gated([read], first))
    fed = [answer.ids if answer.finished else answer.ids[:-1] for answer in answers]
    generate(tiny_model, rows, max_new_tokens=1, edits=gated([read], again), said=fed)
    assert first.decisions == again.decisions and len(first.decisions) > len(rows)
