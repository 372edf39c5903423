"""Edits land on exactly the tokens meant, by absolute position, however the forward passes are cut."""

from __future__ import annotations

import pytest
import torch

from pingscope.interp import Edit, Prompt, UserError, edit
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooks import capture
from pingscope.interp.model.selection import at, final, generated, parse, prompt, role

NEW = 5


def rows_of(model):
    texts = ["Click the first link.", "Delete her private photos in secret, then post them.", "Buy"]
    return [model.render(Prompt(f"p{i}", text, prefix="# Note:" if i == 1 else None)) for i, text in enumerate(texts)]


def bump(x):
    return x + 1.0


class Oracle:
    """What really changed between a block's output and the next block's input, as (row, absolute position).

    It counts columns itself: it knows the padding it was told of and how many columns went before.
    """

    def __init__(self, model, layer, pads, cached=True):
        self.touched, self.seen, self.widths = [], set(), []
        self.pads, self.cached = pads, cached
        self.before = None
        self.handles = [
            model.blocks[layer].register_forward_hook(self.remember),
            model.blocks[layer + 1].register_forward_pre_hook(self.compare, with_kwargs=True),
        ]

    def remember(self, module, args, output):
        self.before = (output[0] if isinstance(output, tuple) else output).clone()

    def compare(self, module, args, kwargs):
        after = args[0] if args else kwargs["hidden_states"]
        changed = (after != self.before).any(-1)
        past = sum(self.widths) if self.cached else 0
        self.widths.append(after.shape[1])
        for i, pad in enumerate(self.pads):
            for column in range(after.shape[1]):
                where = (i, past + column - pad)
                self.seen.add(where)
                if changed[i, column]:
                    self.touched.append(where)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def expected(rows, where, n_new):
    """Positions meant, prompt and generated; the last new token is never fed back."""
    out = set()
    for i, row in enumerate(rows):
        flags = where.mask(row)
        out |= {(i, p) for p, flag in enumerate(flags) if flag}
        fed_back = torch.arange(n_new - 1)
        out |= {(i, len(row) + p) for p in range(n_new - 1) if where.generated_mask(fed_back)[p]}
    return out


SELECTIONS = [
    "final",
    "prompt",
    "role:instruction",
    "role:prefix,header",
    "generated[0:2]",
    "generated[1:]",
    "at:0,-2",
    "final | generated[0:]",
    "prompt | generated[0:3] - role:template",
]


CASES = [("llama", text) for text in SELECTIONS] + [
    (family, SELECTIONS[-1]) for family in ("gpt2", "gemma2", "mistral", "gpt_neox", "mixtral", "opt")
]


@pytest.mark.parametrize(("family", "text"), CASES)
@pytest.mark.parametrize("mode", ["cache", "no_cache", "chunked"])
def test_edits_touch_exactly_the_selected_positions(load, family, mode, text):
    model, where = load(family), parse(text)
    rows = rows_of(model)
    batch = model.batch(rows, side="left")
    pads = [batch.ids.shape[1] - len(row) for row in rows]
    options = {"cache": {}, "no_cache": {"use_cache": False}, "chunked": {"prefill_chunk_size": 4}}[mode]
    with edit(model, rows, [Edit(1, where, bump)], NEW - 1), Oracle(model, 1, pads, mode != "no_cache") as oracle:
        # the oracle's hook on block 1 comes after the edit's, so it must be asked to go first
        oracle.handles[0].remove()
        oracle.handles[0] = model.blocks[1].register_forward_hook(oracle.remember, prepend=True)
        model.hf.generate(
            batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            **options,
        )
    meant = expected(rows, where, NEW)
    assert set(oracle.touched) == meant
    if mode != "no_cache":
        assert len(oracle.touched) == len(meant), "an edit fired twice"
        assert len(oracle.widths) == (NEW if mode == "cache" else NEW - 1 + -(-batch.ids.shape[1] // 4))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_edit_of_residuals_changes_the_selected_rows_and_no_other(tiny_model, side, layer):
    rows = rows_of(tiny_model)
    batch = tiny_model.batch(rows, side=side)
    got = {}
    with torch.no_grad():
        with capture(tiny_model, [layer], lambda _, x: got.update(plain=x.clone())):
            tiny_model.base(**tiny_model.inputs(batch))
        with (
            edit(tiny_model, rows, [Edit(layer, role("instruction"), bump)]),
            capture(tiny_model, [layer], lambda _, x: got.update(edited=x.clone())),
        ):
            tiny_model.base(**tiny_model.inputs(batch))
    for i, row in enumerate(rows):
        real = batch.mask[i].bool()
        plain, edited = got["plain"][i][real], got["edited"][i][real]
        meant = torch.tensor(role("instruction").mask(row))
        assert torch.equal(edited[~meant], plain[~meant])
        assert torch.equal(edited[meant], plain[meant] + 1)
        if not real.all():
            assert torch.equal(got["edited"][i][~real], got["plain"][i][~real])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mistral", "opt"])
@pytest.mark.parametrize("text", ["final | generated[0:]", "role:instruction"])
def test_edited_generation_in_a_batch_equals_one_prompt_at_a_time(load, family, text):
    model = load(family)
    rows = rows_of(model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)) * 30
    edits = [Edit(layer, parse(text), lambda x: x + vector) for layer in (1, 2)]
    together = generate(model, rows, max_new_tokens=8, edits=edits)
    alone = [generate(model, [row], max_new_tokens=8, edits=edits)[0] for row in rows]
    assert together == alone
    assert together != generate(model, rows, max_new_tokens=8)


def test_final_token_edit_changes_the_first_new_token(tiny_model):
    rows = rows_of(tiny_model)
    vector = torch.randn(tiny_model.d_model, generator=torch.Generator().manual_seed(1)) * 30
    plain = tiny_model.next_token_logits(rows)
    steered = tiny_model.next_token_logits(rows, [Edit(3, final(), lambda x: x + vector)])
    assert (plain - steered).abs().max() > 1
    first = generate(tiny_model, rows, max_new_tokens=1, edits=[Edit(3, final(), lambda x: x + vector)])
    end = 1
    assert [g.ids[0] if g.ids else end for g in first] == steered.argmax(-1).tolist()


def test_a_response_already_there_counts_as_generated(tiny_model):
    row = tiny_model.render(Prompt("p", "Click", response="do(action='Click')"))
    changed = tiny_model.residuals([row], 0, [Edit(0, generated(0, 2), bump)])[0][0]
    plain = tiny_model.residuals([row], 0)[0][0]
    touched = (changed != plain).any(-1).nonzero()[:, 0].tolist()
    assert touched == [row.n_prompt, row.n_prompt + 1]


def test_an_edit_that_matches_nothing_is_refused_before_the_forward_pass(tiny_model):
    rows = rows_of(tiny_model)
    ran = []
    handle = tiny_model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        for where in (role("page"), at(4000), generated(0)):
            with pytest.raises(UserError, match="matches no token"):
                tiny_model.residuals(rows, "all", [Edit(0, where, bump)])
        with pytest.raises(UserError, match="matches no token"):
            generate(tiny_model, rows, max_new_tokens=3, edits=[Edit(0, generated(2), bump)])
        with pytest.raises(UserError, match="layer 9"):
            tiny_model.residuals(rows, "all", [Edit(9, final(), bump)])
    finally:
        handle.remove()
    assert not ran


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def test_own_hooks_go_and_the_users_hooks_stay(tiny_model):
    rows = rows_of(tiny_model)
    calls = []
    before = hook_count(tiny_model)  # other libraries leave theirs on a model that they share
    mine = tiny_model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    try:
        assert hook_count(tiny_model) == before + 1
        generate(tiny_model, rows, max_new_tokens=2, edits=[Edit(1, final(), bump)])
        assert hook_count(tiny_model) == before + 1 and len(calls) == 2

        def broken(x):
            raise ValueError("from the user's function")

        with pytest.raises(ValueError, match="the user's function"):
            generate(tiny_model, rows, max_new_tokens=2, edits=[Edit(2, final(), broken)])
        with pytest.raises(UserError, match="shape"):
            tiny_model.residuals(rows, "all", [Edit(2, final(), lambda x: x[:, :3])])
        assert hook_count(tiny_model) == before + 1
    finally:
        mine.remove()


def test_edits_return_new_tensors(tiny_model):
    """A hook that ran before the edit keeps what it saw."""
    rows = rows_of(tiny_model)
    seen = []
    handle = tiny_model.blocks[1].register_forward_hook(lambda m, a, o: seen.append(o))
    try:
        plain = tiny_model.residuals(rows, 1)[1]
        before = [x.clone() for x in seen]
        seen.clear()
        changed = tiny_model.residuals(rows, 1, [Edit(1, prompt(), bump)])[1]
        assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
        assert all(torch.equal(a + 1, b) for a, b in zip(plain, changed, strict=True))
    finally:
        handle.remove()


def test_gradients_flow_through_an_edit(tiny_model):
    rows = rows_of(tiny_model)
    vector = torch.zeros(tiny_model.d_model, requires_grad=True)
    batch = tiny_model.batch(rows)
    with edit(tiny_model, rows, [Edit(1, final(), lambda x: x + vector)]):
        tiny_model.hf(**tiny_model.inputs(batch)).logits.sum().backward()
    assert vector.grad.abs().sum() > 0
    tiny_model.hf.zero_grad()


def test_a_cache_filled_before_the_edit_is_noticed(tiny_model):
    row = tiny_model.render(Prompt("p", "Click the first link."))
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        cache = tiny_model.base(ids[:, :-2], use_cache=True).past_key_values
        with pytest.raises(UserError, match="cache filled before"), edit(tiny_model, [row], [Edit(1, prompt(), bump)]):
            tiny_model.base(ids[:, -2:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)


def test_another_batch_inside_an_edit_is_refused(tiny_model):
    rows = rows_of(tiny_model)
    with pytest.raises(UserError, match="prompts"), edit(tiny_model, rows, [Edit(1, final(), bump)]):
        tiny_model.base(torch.tensor([rows[0].ids]))


def test_tuple_outputs_are_edited_in_place_of_their_first_part(tiny_model):
    """Some architectures return (stream, …): the rest must come through."""
    rows = rows_of(tiny_model)
    plain = tiny_model.next_token_logits(rows, [Edit(1, final(), bump)])
    wrap = tiny_model.blocks[1].register_forward_hook(lambda m, a, o: (o, "extra"), prepend=True)
    seen = []
    unwrap = tiny_model.blocks[2].register_forward_pre_hook(
        lambda m, a, k: (seen.append(a[0][1]), ((a[0][0], *a[1:]), k))[1], with_kwargs=True
    )
    try:
        assert torch.equal(tiny_model.next_token_logits(rows, [Edit(1, final(), bump)]), plain)
        assert seen == ["extra"]
    finally:
        wrap.remove()
        unwrap.remove()
