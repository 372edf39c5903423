"""What each backend accepts, refuses and leaves alone; their numbers are the parity suite's (test_parity.py)."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from tiny_models import build_model, train_tokenizer

from pingscope.interp import Edit, HookedModel, Prompt, UserError, load_model
from pingscope.interp.causal.attribution import attribute
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.check import distance
from pingscope.interp.model.selection import final, parse, prompt
from pingscope.interp.store.extraction import extract


def rows_of(model, n=4):
    texts = ["Buy the laptop " * (1 + 2 * i) for i in range(n)]
    return [model.render(Prompt(f"p{i}", text)) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def bridge(tiny_model):
    return load_model(tiny_model, backend="transformer_lens")


@pytest.fixture(scope="module")
def traced(tiny_model):
    return load_model(tiny_model, backend="nnsight")


def test_other_libraries_are_imported_only_when_used():
    code = (
        "import sys, pingscope.interp.loading\n"
        "from pingscope.interp import estimate, Generation\n"
        "assert not {'transformer_lens', 'nnsight'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_requests(tiny_model, bridge, checkpoint):
    for options, words in (
        ({"backend": "jax"}, "backend 'jax': unknown; use one of hf, transformer_lens, nnsight"),
        ({"remote": True}, "remote needs backend='nnsight'"),
        ({"backend": "transformer_lens", "remote": "local"}, "remote needs"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(checkpoint(), **options)
    with pytest.raises(UserError, match="cannot use a dict"):
        load_model({})
    with pytest.raises(UserError, match="TransformerBridge cannot be used by backend 'nnsight'"):
        load_model(bridge.bridge, backend="nnsight")
    with pytest.raises(UserError, match="load it again"):
        load_model(bridge, backend="hf")
    assert load_model(tiny_model) is tiny_model


def test_a_loaded_model_is_copied_before_it_is_bridged():
    tokenizer = train_tokenizer()
    model = HookedModel(build_model("llama", len(tokenizer)), tokenizer, name="in-memory")
    rows = rows_of(model)
    before, names = model.residuals(rows, 3)[3], list(model.hf.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bridged = load_model(model, backend="transformer_lens")
    assert list(model.hf.state_dict()) == names and model.hf.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(model.residuals(rows, 3)[3], before, strict=True))
    assert bridged.hf is not model.hf and bridged.fingerprint == model.fingerprint
    with pytest.warns(UserWarning, match="in-memory: TransformerLens rewrites this model in place"):
        rewritten = load_model(model, backend="transformer_lens", copy=False)
    assert rewritten.hf is model.hf and list(model.hf.state_dict()) != names


def test_bridging_a_vision_model_installs_nothing(load, monkeypatch):
    """TransformerLens would run pip for torchvision, which replaces torch under the running process."""
    ran, plain = [], load("gemma3_vlm")
    monkeypatch.setattr(subprocess, "check_call", lambda words, *args, **options: ran.append(words))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not there
    model = load_model(plain, backend="transformer_lens")
    assert model.n_layers == 4 and ran == []


def test_a_bridge_that_is_already_there_is_used_as_it_is(tiny_model, bridge):
    rows = rows_of(tiny_model)
    again = load_model(bridge.bridge, backend="transformer_lens")
    assert again.bridge is bridge.bridge
    ours = [again.render(Prompt(f"p{i}", "Buy the laptop " * (1 + 2 * i))) for i in range(4)]
    assert [row.ids for row in ours] == [row.ids for row in rows]
    found, wanted = again.residuals(rows, "all"), tiny_model.residuals(rows, "all")
    assert all(distance(a, b) < 1e-5 for l in range(4) for a, b in zip(found[l], wanted[l], strict=True))


def test_a_bridge_in_compatibility_mode_is_refused(checkpoint):
    model = load_model(checkpoint("gpt2"), backend="transformer_lens")
    model.bridge.compatibility_mode = True
    with pytest.raises(UserError, match="compatibility mode"):
        load_model(model.bridge, backend="transformer_lens")


def test_own_hooks_go_and_the_bridges_other_hooks_stay(bridge):
    rows, calls = rows_of(bridge), []
    point = bridge.bridge.blocks[1].hook_out
    point.add_hook(lambda x, hook: calls.append(1))
    try:
        generate(bridge, rows, max_new_tokens=2, edits=[Edit(1, final(), lambda x: x + 1)])
        assert len(point.fwd_hooks) == 1 and calls
        with pytest.raises(UserError, match="shape"):
            bridge.residuals(rows, "all", [Edit(1, final(), lambda x: x[:, :3])])
        assert len(point.fwd_hooks) == 1
    finally:
        bridge.bridge.reset_hooks()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_heads_by_the_bridge_are_those_of_the_split_projection(family, load):
    from pingscope.interp.backends.transformer_lens import head_writes

    model = load(family)
    bridged = load_model(model, backend="transformer_lens")
    rows = rows_of(model)
    w = np.random.default_rng(0).standard_normal(model.d_model)
    split = attribute(model, rows, {3: (w, 0.0)}, prompt())[3].heads
    for layer in (0, 3):
        writes = head_writes(bridged, rows, layer, prompt())
        theirs = np.stack([(x @ torch.tensor(w)).mean(0).numpy() for x in writes])
        assert theirs == pytest.approx(split[:, layer], rel=1e-4, abs=1e-4)
        assert np.abs(theirs).min() > 1e-3  # no head is silent: an equal zero would show nothing
    assert head_writes(bridged, rows, 0)[2].shape == (1, model.n_heads, model.d_model)
    assert not bridged.bridge.blocks[3].attn.hook_z.fwd_hooks


def test_the_bridge_stops_after_the_deepest_layer(bridge):
    calls = []
    handle = bridge.on_residual(2, calls.append)
    bridge.residuals(rows_of(bridge), "0-1")
    assert not calls
    bridge.residuals(rows_of(bridge), "2")
    handle.remove()
    assert calls


def test_the_trace_stops_after_the_deepest_layer_and_leaves_the_model_plain(tiny_model, traced):
    ran, rows = [], rows_of(tiny_model)
    handle = tiny_model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    traced.residuals(rows, "0")
    assert not ran
    traced.residuals(rows, "2")
    handle.remove()
    assert ran and traced.hf is tiny_model.hf
    assert tiny_model.tokenizer.padding_side == train_tokenizer().padding_side


def test_the_plain_model_can_be_edited_after_it_was_traced(load):
    """nnsight wraps forward passes and hides their parameters; GPT-2's are called by position."""
    model = load("gpt2")
    rows, edits = rows_of(model), [Edit(1, final(), lambda x: x * 2)]
    before = model.next_token_logits(rows, edits)
    traced = load_model(model, backend="nnsight")
    assert torch.equal(model.next_token_logits(rows, edits), before)
    assert traced.takes_positions and torch.equal(traced.next_token_logits(rows, edits), before)


def test_errors_of_an_edit_come_through_the_trace(traced):
    rows = rows_of(traced)
    with pytest.raises(UserError, match=r"layer 2: fn returned shape"):
        traced.residuals(rows, "all", [Edit(2, final(), lambda x: x[:, :3])])
    with pytest.raises(UserError, match="matches no token"):
        traced.residuals(rows, "all", [Edit(2, parse("role:page"), lambda x: x)])


def test_what_travels_to_ndif_gives_the_same_here(tiny_model):
    """``remote="local"`` serialises every trace as NDIF gets it, hides this package, and runs it."""
    shipped = load_model(tiny_model, backend="nnsight", remote="local")
    rows = rows_of(tiny_model, 3)
    vector = torch.ones(tiny_model.d_model)
    edits = [Edit(1, parse("final | generated[0:2]"), lambda x: x + vector), Edit(-1, final(), lambda x: x * 2)]
    found, wanted = (m.residuals(rows, "embed,all", edits) for m in (shipped, tiny_model))
    assert all(torch.equal(a, b) for l in wanted for a, b in zip(found[l], wanted[l], strict=True))
    assert torch.equal(shipped.next_token_logits(rows, edits), tiny_model.next_token_logits(rows, edits))
    said = generate(tiny_model, rows, max_new_tokens=4, edits=edits)
    assert generate(shipped, rows, max_new_tokens=4, edits=edits) == said


def test_a_remote_model_loads_no_weights_and_says_when_ndif_is_out_of_reach(checkpoint, monkeypatch):
    import nnsight
    from nnsight.modeling import huggingface

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    model = load_model(checkpoint(), backend="nnsight", remote=True)
    assert all(p.is_meta for p in model.hf.parameters()) and model.device.type == "cpu"
    assert (model.n_layers, model.d_model) == (4, 64) and len(model.fingerprint) == 64
    with pytest.raises(UserError, match=r"NDIF did not run the trace.*hub id"):
        model.residuals(rows_of(model), "all")  # a folder is nothing to NDIF
    monkeypatch.setitem(huggingface._ID_CACHE, model.traced.repo_id, "someone/model")
    for call in (
        lambda: model.residuals(rows_of(model), "all"),
        lambda: model.next_token_logits(rows_of(model), [Edit(1, final(), lambda x: x + 1)]),
        lambda: generate(model, rows_of(model), max_new_tokens=2, edits=[Edit(1, final(), lambda x: x + 1)]),
    ):
        with pytest.raises(UserError, match=r"NDIF did not run the trace.*refused") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another machine"):
        model.part(0, "attn_out")


def test_a_remote_model_without_a_commit_has_no_identity(checkpoint, tiny_model):
    model = load_model(checkpoint(), backend="nnsight", remote=True)
    local = model.fingerprint
    model.name = "someone/model"
    del model.__dict__["_source_fingerprint"]
    with pytest.raises(UserError, match=r"someone/model.*revision="):
        _ = model.fingerprint
    model.hf.config._commit_hash = "abc"
    first = model.fingerprint
    del model.__dict__["_source_fingerprint"]
    model.hf.config._commit_hash = "def"
    assert len({local, first, model.fingerprint, tiny_model.fingerprint}) == 4


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_stores_of_other_backends(tiny_model, bridge, traced, tmp_path, backend):
    rows = rows_of(tiny_model)
    stores = [extract(m, rows, tmp_path / m.backend, layers="embed,1,3") for m in (tiny_model, bridge, traced)]
    by_name = {store.meta["identity"]["backend"]: store for store in stores}
    for layer in (-1, 1, 3):
        assert distance(by_name[backend].layer(layer), by_name["hf"].layer(layer)) < 1e-5
    assert by_name[backend].meta["identity"]["model"] == tiny_model.fingerprint
    with pytest.raises(UserError, match="differs in its backend"):
        extract(tiny_model, rows, tmp_path / backend, layers="embed,1,3")


class TestActivationCache:
    def test_a_store_as_a_cache(self, tiny_model, bridge, tmp_path):
        from pingscope.interp.backends.transformer_lens import to_activation_cache

        rows = rows_of(tiny_model)
        store = extract(tiny_model, rows, tmp_path / "s", layers="embed,all")
        cache = to_activation_cache(store, model=bridge.bridge)
        batch = tiny_model.batch(rows)
        names = ["blocks.0.hook_in", *(f"blocks.{l}.hook_out" for l in range(4))]
        _, theirs = bridge.bridge.run_with_cache(batch.ids, attention_mask=batch.mask, names_filter=names)
        for l in range(4):
            for i, row in enumerate(rows):
                found = cache["resid_post", l][i]
                assert distance(found[: len(row)], theirs[f"blocks.{l}.hook_out"][i, : len(row)]) < 1e-5
                assert not found[len(row) :].any()
        assert torch.equal(cache["resid_pre", 0][2, : len(rows[2])], store.layer(-1)[store.rows("p2")])
        some = to_activation_cache(store, ["p3", "p0"])
        assert torch.equal(some["resid_post", 1][0], cache["resid_post", 1][3])
        with pytest.raises(UserError, match="no prompt 'p9'"):
            to_activation_cache(store, ["p9"])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_cache_as_a_store(self, tiny_model, bridge, tmp_path, side):
        from pingscope.interp.backends.transformer_lens import from_activation_cache

        rows = rows_of(tiny_model)
        batch = tiny_model.batch(rows, side=side)
        names = [f"blocks.{l}.hook_resid_post" for l in (1, 3)]
        _, cache = bridge.bridge.run_with_cache(batch.ids, attention_mask=batch.mask, names_filter=names)
        found = from_activation_cache(
            cache, tiny_model, rows, tmp_path / side, side=side, where=parse("role:instruction"), token_budget=40
        )
        wanted = extract(tiny_model, rows, tmp_path / "own", layers="1,3", where=parse("role:instruction"))
        assert found.index.equals(wanted.index) and found.layers == [1, 3]
        assert all(distance(found.layer(l), wanted.layer(l)) < 1e-5 for l in (1, 3))
        assert found.meta["identity"]["backend"] == "transformer_lens cache"
        with pytest.raises(UserError, match="shape"):
            from_activation_cache(cache, tiny_model, rows[:2], tmp_path / "x")
        with pytest.raises(UserError, match="no residuals"):
            from_activation_cache({}, tiny_model, rows, tmp_path / "x")
