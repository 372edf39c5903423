"""The suite that every backend must pass: equal to unpadded single-prompt Hugging Face runs.

The reference is made without the machinery under test: one prompt at a time, no padding, no cache, plain hooks at
explicit positions, greedy continuation by running the whole text again for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import collate
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.generate.generation import end_ids, generate
from pingscope.interp.model.check import distance
from pingscope.interp.model.discovery import text_config
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit
from pingscope.interp.model.selection import EMBED, parse

# Relative to the largest value of the stream; half precision rounds every sum of a batched kernel differently.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
WORDS = "the quick brown fox jumps over the lazy dog and reads a page about rivers before it goes home "
SELECTION = "final | role:instruction - at:1 | generated[0:3]"


@dataclass(frozen=True)
class Check:
    """One property over all prompts, layers and batches it was tried on.

    Attributes:
        error: worst relative error; for generation the share of answers that differ.
        tolerance: what is allowed; cases: comparisons made; worst: where the error is largest.
    """

    name: str
    error: float
    tolerance: float
    cases: int
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def sample_prompts(model: HookedModel, longest: int = 1024) -> list[Rendered]:
    """Five ragged prompts, without a chat template; one longer than the sliding window, if ``longest`` allows."""
    unit = list(model.tokenizer(WORDS, add_special_tokens=False)["input_ids"])
    room = min(longest, model.context_length - 16)
    window = sliding_window(model)
    lengths = [3, 11, 24, 37, 60] if window is None or window + 8 > room else [3, 11, 24, window + 8, window // 2]
    rows = []
    for number, wanted in enumerate(lengths):
        n = max(3, min(wanted, room))
        ids = (unit[number:] + unit * (n // len(unit) + 1))[:n]
        roles = ("template", *["instruction"] * (n - 2), "header")
        rows.append(Rendered(f"sample-{number}", "", tuple(ids), roles))
    return rows


def sliding_window(model: HookedModel) -> int | None:
    """Tokens that the narrowest attention layer sees, or None if all see everything."""
    config = text_config(model.hf)
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else None


def sample_edits(model: HookedModel, rows: Sequence[Rendered]) -> list[Edit]:
    """Two edits, in the middle and before block 0, of the size of the stream itself."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=generator)
    middle = model.n_layers // 2
    size = Reference(model).stream(rows[1], ())[middle].float().std() if model.remote is not True else 1.0

    def add(x: Tensor) -> Tensor:
        return x + (vector * float(size)).to(x)

    def scale(x: Tensor) -> Tensor:
        return x * 1.25

    return [Edit(middle, parse(SELECTION), add), Edit(EMBED, parse("final"), scale)]


class Reference:
    """Plain runs of one prompt each, of a model loaded by the backend ``hf``."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    @torch.no_grad()
    def stream(self, row: Rendered, edits: Sequence[Edit], said: Sequence[int] = ()) -> dict[int, Tensor]:
        """The stream after every layer of one unpadded pass, and under key ``n_layers`` the final hidden state.

        Hugging Face's own list where it gives one, but for the last block's output, which that list has only after
        the final norm.
        """
        return self._run(row, edits, said)[0]

    @torch.no_grad()
    def logits(self, row: Rendered, edits: Sequence[Edit], said: Sequence[int] = ()) -> Float[Tensor, " vocab"]:
        """Logits after the last token."""
        return self._run(row, edits, said)[1].logits[0, -1, : self.model.vocab_size].float().cpu()

    def continuation(self, row: Rendered, edits: Sequence[Edit], new_tokens: int) -> tuple[int, ...]:
        """Greedy ids, the whole text run again for every one."""
        ends = end_ids(self.model)
        said: list[int] = []
        for _ in range(new_tokens):
            said.append(int(self.logits(row, edits, said).argmax()))
            if said[-1] in ends:
                return tuple(said[:-1])
        return tuple(said)

    def _run(self, row: Rendered, edits: Sequence[Edit], said: Sequence[int]) -> tuple[dict[int, Tensor], Any]:
        hf, handles = self.model.hf, []
        for e in edits:
            # With the head start of a response already there, positions after the prompt count from it.
            fresh = torch.arange(len(row) - row.n_prompt, len(row) - row.n_prompt + len(said))
            mask = torch.tensor([*e.where.mask(row), *e.where.generated_mask(fresh).tolist()])

            def change(x: Tensor, mask: Tensor = mask, fn: Callable[[Tensor], Tensor] = e.fn) -> Tensor:
                out = x.clone()
                if bool(mask.any()):
                    out[0, mask.to(x.device)] = fn(x[0, mask.to(x.device)])
                return out

            handles.append(self.model.on_residual(e.layer, change))
        seen: dict[int, Tensor] = {}
        # Its own list where it begins with the embedding, as nearly all do; otherwise what its modules put out.
        own = self.model.first_state == EMBED and not self.model.idle
        for layer in (self.model.n_layers - 1,) if own else range(EMBED, self.model.n_layers):
            handles.append(self.model.on_residual(layer, partial(seen.__setitem__, layer)))
        ids = torch.tensor([[*row.ids, *said]], device=self.model.device)
        try:
            with self.model.evaluating():
                out = hf(input_ids=ids, use_cache=False, output_hidden_states=not edits)
        finally:
            for handle in handles:
                handle.remove()
        if edits:
            return {}, out
        if own:
            *streams, final = map(self.model.beside, out.hidden_states)
            seen |= dict(enumerate(streams, EMBED)) | {self.model.n_layers: final}
        elif self.model.final_norm is not None:
            seen[self.model.n_layers] = out.hidden_states[-1]
        return {layer: x[0] for layer, x in seen.items()}, out


@dataclass(frozen=True)
class Comparison:
    """A model under test beside plain runs of its reference, on the same rows."""

    model: HookedModel
    plain: Reference
    rows: Sequence[Rendered]
    edits: Sequence[Edit]
    streams: Sequence[dict[int, Tensor]]  # the reference's, per row

    def layer_errors(self, found: dict[int, list[Tensor]], order: Sequence[int] | None = None) -> dict[str, float]:
        """Error by layer and row of streams that were read in ``order`` (default: of all rows)."""
        order = range(len(self.rows)) if order is None else order
        return {
            f"layer {layer}, {self.rows[i].id}": distance(x, self.streams[i][layer])
            for layer, per_row in found.items()
            for i, x in zip(order, per_row, strict=True)
        }


Errors = Iterator[tuple[str, dict[str, float]]]  # name of a check, and its errors by case


@torch.no_grad()
def run_parity(
    model: HookedModel,
    reference: HookedModel | None = None,
    rows: Sequence[Rendered] | None = None,
    *,
    new_tokens: int = 6,
    progress: Callable[[str], None] | None = None,
) -> list[Check]:
    """Compare ``model`` with plain runs of ``reference`` (default: its own ``hf``, which backend ``hf`` leaves plain).

    Over both padding sides, several compositions of batches, both attention kernels where the model can switch,
    edits at selected positions, and generation with cache, without, and with prefill in chunks.
    """
    source = reference or model
    rows = list(rows or sample_prompts(model))
    plain, edits = Reference(source), sample_edits(source, rows)
    both = Comparison(model, plain, rows, edits, [plain.stream(row, ()) for row in rows])
    limit = TOLERANCE.get(model.hf.dtype, 5e-2)
    # In half precision two tokens can tie; which one wins is then a matter of rounding, and only reported.
    limit_ids = 0.0 if model.hf.dtype in (torch.float32, torch.float64) else 1.0
    checks: list[Check] = []
    parts = ((_residuals(both), limit), (_logits(both), limit), (_answers(both, new_tokens), limit_ids))
    for errors_of, tolerance in parts:
        for name, errors in errors_of:
            worst = max(errors, key=lambda key: errors[key])
            share = errors[worst] if tolerance == limit else sum(errors.values()) / len(errors)
            checks.append(Check(name, share, tolerance, len(errors), worst))
            if progress is not None:
                progress(name)
    return checks


def _residuals(both: Comparison) -> Errors:
    """The stream: padded on either side, in other batches, at chosen positions, with the other attention kernel."""
    model, rows = both.model, both.rows
    for side in ("right", "left") if model.pads else ("right",):
        yield f"residuals, {side} padding", both.layer_errors(padded_residuals(model, rows, side))
    norm, depth = both.plain.model.final_norm, both.plain.model.n_layers
    if norm is not None:
        pairs = zip(rows, both.streams, strict=True)
        ends = {row.id: distance(norm(stream[depth - 1]), stream[depth]) for row, stream in pairs}
        yield "final norm of the last block", ends
    compositions = {"one by one": [[i] for i in range(len(rows))], "pairs": [[0, 3], [1, 2], [4, 0]]}
    for name, groups in compositions.items():
        errors: dict[str, float] = {}
        for group in groups:
            found = both.layer_errors(model.residuals([rows[i] for i in group], "embed,all"), group)
            errors |= {f"{where}, batch {group}": error for where, error in found.items()}
        yield f"residuals, {name}", errors
    kept, whole = model.residuals(rows, "all", where=parse("final | at:0")), model.residuals(rows, "all")
    picked = {
        f"layer {layer}": max(distance(a, b[[0, -1]]) for a, b in zip(kept[layer], whole[layer], strict=True))
        for layer in kept
    }
    yield "residuals, selected positions", picked
    with other_attention(model) as kernel:
        if kernel:
            yield f"residuals, {kernel} attention", both.layer_errors(model.residuals(rows, "embed,all"))


def _logits(both: Comparison) -> Errors:
    """Logits after the last token, with edits and without."""
    for name, changes in (("logits", ()), ("logits, edited", both.edits)):
        logits = both.model.next_token_logits(both.rows, changes)
        plain = [both.plain.logits(row, changes) for row in both.rows]
        yield name, {row.id: distance(logits[i], plain[i]) for i, row in enumerate(both.rows)}


def _answers(both: Comparison, new_tokens: int) -> Errors:
    """Greedy answers, 1 where one differs: with a cache, without, and with the prompt read in chunks."""
    modes: dict[str, dict[str, Any]] = {"cache": {}, "no cache": {"use_cache": False}}
    if both.model.keeps_keys and both.model.pads:
        modes["chunks"] = {"prefill_chunk": 5}
    for name, changes in (("generation", ()), ("generation, edited", both.edits)):
        wanted = [both.plain.continuation(row, changes, new_tokens) for row in both.rows]
        for mode, options in modes.items():
            said = generate(both.model, both.rows, max_new_tokens=new_tokens, edits=changes, **options)
            cases = zip(both.rows, said, wanted, strict=True)
            yield f"{name}, {mode}", {row.id: float(g.ids != ids) for row, g, ids in cases}


def padded_residuals(model: HookedModel, rows: Sequence[Rendered], side: Any) -> dict[int, list[Tensor]]:
    """The stream after every layer at the real tokens of one batch padded on ``side``."""
    batch = collate(rows, model.pad_id, side).to(model.device)
    found: dict[int, list[Tensor]] = {}
    real = [mask.bool().cpu() for mask in batch.mask]

    def keep(layer: int, x: Tensor) -> None:
        found[layer] = [x[i].cpu()[mask] for i, mask in enumerate(real)]

    model.read(batch, range(EMBED, model.n_layers), keep)
    return {layer: [x.to(model.device) for x in xs] for layer, xs in found.items()}


@contextmanager
def other_attention(model: HookedModel) -> Iterator[str]:
    """Inside the block the attention kernel is the one not in use, of sdpa and eager; yields it, or nothing."""
    config = text_config(model.hf)
    own = getattr(config, "_attn_implementation", None)
    other = {"sdpa": "eager", "eager": "sdpa"}.get(own or "", "")
    if model.backend == "transformer_lens" or model.remote or not hasattr(model.hf, "set_attn_implementation"):
        other = ""  # a bridge keeps eager attention, for its hook points
    elif other == "sdpa" and not getattr(model.hf, "_supports_sdpa", False):
        other = ""
    try:
        if other:
            model.hf.set_attn_implementation(other)
            other = other if getattr(config, "_attn_implementation", None) == other else ""
        yield other
    finally:
        if own and getattr(config, "_attn_implementation", None) != own:
            model.hf.set_attn_implementation(own)
