"""Greedy generation for many answers to few prompts: a prompt is read once and its keys and values are shared.

Rows that differ only in their injected prefix have a prompt in common. Its keys and values are kept once, also for
later calls, and every row attends in two parts: to the shared prompt, one matrix product for all rows of a prompt, and
to its own prefix and answer. The parts are merged by their log-sum-exp (cascade attention), so the result is that of
plain attention. Positions, not slots, decide what a query may see: windows are exact, also for prefixes of different
lengths in one batch. Models whose attention cannot be replaced get copies of the prompt's cache instead.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp.batching import token_budget_batches
from interp.chat import Rendered
from interp.errors import UserError
from interp.families import text_config
from interp.generate import Generation, end_ids
from interp.model import HookedModel
from interp.recent import Recent

NAME = "pingscope_shared_prefill"  # of the attention function, in the registry of transformers
ROW_BUDGET = 32_768  # slots (rows x longest prefix and answer) of one batch
MEMORY = 1 << 30  # bytes of prompts kept for later calls
MANY_ROWS = 512
WORTH_MOVING = 0.75  # finished rows leave the batch when it shrinks to this share
STOP_MARKS = frozenset(")>}`\n.!?")  # an outcome is decided at one of these

Stop = Callable[[str], bool]
Layer = tuple[Float[Tensor, "kv_head _ d_head"], Float[Tensor, "kv_head _ d_head"]]


@dataclass
class _Cost:
    """What was computed: prompt tokens read, prefix tokens read, tokens generated."""

    prompt_tokens: int = 0
    prefix_tokens: int = 0
    new_tokens: int = 0


class SharedPrefill:
    """Continues rows greedily; the same ids as :func:`interp.generate.generate`, token for token.

    Args:
        sharing: ``cascade``, ``expanded`` (every row has a copy of its prompt's cache), or ``auto``: cascade where a
            trial gives the model's own logits. :attr:`problem` says why it does not.
        memory: bytes of prompt keys and values kept between calls; the longest unused go first.
        row_budget: slots of one batch, rows x (prefix + new tokens).

    Attributes:
        cost: tokens computed so far.
    """

    def __init__(
        self,
        model: HookedModel,
        *,
        sharing: Literal["auto", "cascade", "expanded"] = "auto",
        memory: int = MEMORY,
        row_budget: int = ROW_BUDGET,
    ) -> None:
        self.model, self.memory, self.row_budget = model, memory, row_budget
        self.cost = _Cost()
        self._sharing = sharing
        self._kept: Recent[Any] = Recent(memory)
        self._fingerprint = ""

    @cached_property
    def problem(self) -> str:
        """Why attention cannot be shared in this model; empty where it can. Said once, since copies cost time."""
        found = _trial(self.model)
        if found:
            warnings.warn(
                f"{self.model.name}: {found}; every row gets a copy of its prompt, which is slower", stacklevel=2
            )
        return found

    @property
    def sharing(self) -> str:
        if self._sharing == "auto":
            return "expanded" if self.problem else "cascade"
        return self._sharing

    def generate(
        self,
        rows: Sequence[Rendered],
        *,
        max_new_tokens: int = 64,
        stop: Stop | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Continue every row, in the order given.

        Args:
            stop: told what a row has said so far whenever a token ends a clause (:data:`STOP_MARKS`); true ends it.
            progress: called with the number of rows just finished.

        Raises:
            UserError: a prompt longer than the context.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} is not positive; give at least 1")
        self.model.check_context(rows, new_tokens=max_new_tokens)
        _check_length(rows)
        out: list[Generation | None] = [None] * len(rows)
        for members, memory, logits in self._batches(rows, max_new_tokens):
            said = self._decode(members, memory, logits, max_new_tokens, stop)
            done = 0
            for slot, row in enumerate(members):
                if row >= 0:
                    ids, finished = said[slot]
                    out[row] = Generation(rows[row].id, self._text(ids), ids, finished)
                    done += 1
            if progress is not None:
                progress(done)
        return [g for g in out if g is not None]

    def next_token_logits(
        self, rows: Sequence[Rendered], tokens: Sequence[int] | None = None
    ) -> Float[Tensor, "row token"]:
        """Logits after the last token of every row, float32 on the CPU: what a prefix would be followed by.

        Args:
            tokens: keep these of the vocabulary alone (all logits of many rows are large).
        """
        self.model.check_context(rows)
        _check_length(rows)
        kept = torch.arange(self.model.vocab_size) if tokens is None else torch.tensor(list(tokens))
        out = torch.empty((len(rows), len(kept)))
        for members, _, logits in self._batches(rows, 1):
            slots = [slot for slot, row in enumerate(members) if row >= 0]
            found = logits[slots][:, kept.to(logits.device)]
            out[[members[slot] for slot in slots]] = found.float().cpu()
        return out

    def _batches(
        self, rows: Sequence[Rendered], new_tokens: int
    ) -> Iterator[tuple[list[int], _Memory, Float[Tensor, "slot vocab"]]]:
        """Batches as (row of every slot, or -1; the cache after the prefixes; logits of the next token)."""
        fingerprint = self.model.fingerprint
        if fingerprint != self._fingerprint:  # a training step makes every kept prompt stale
            self._kept, self._fingerprint = Recent(self.memory), fingerprint
        cascade = self.sharing == "cascade"
        with self.model.evaluating(), torch.no_grad():
            for prompts, members, own in _plan(rows, new_tokens, self.row_budget, ragged=cascade):
                kept = self._read(prompts)
                ids, padding = _left_padded(own, self.model.pad_id)
                kind = _Cascade if cascade else _Expanded
                memory = kind(self.model, kept, [len(p) for p in prompts], padding, ids.shape[1] + new_tokens)
                logits = memory.forward(ids.to(self.model.device))
                self.cost.prefix_tokens += sum(len(part) for row, part in zip(members, own, strict=True) if row >= 0)
                yield members, memory, logits

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> list[Any]:
        """Keys and values of every prompt; those not kept are read now, in batches."""
        found = {prompt: self._kept.get(prompt) for prompt in prompts}
        fresh = [prompt for prompt, kept in found.items() if kept is None]
        self.cost.prompt_tokens += sum(map(len, fresh))
        if self.sharing == "expanded":
            found |= {prompt: _prompt_cache(self.model, prompt) for prompt in fresh}
        else:
            found |= _prompt_layers(self.model, fresh)
        for prompt in fresh:
            self._kept.put(prompt, found[prompt], _bytes(found[prompt]))
        return [found[prompt] for prompt in prompts]

    def _decode(
        self,
        members: Sequence[int],
        memory: _Memory,
        logits: Float[Tensor, "slot vocab"],
        limit: int,
        stop: Stop | None,
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Greedy ids of every slot, and whether each ended (by an end token or ``stop``); empty slots say nothing."""
        ends, pieces = set(end_ids(self.model)), self._ends_clause
        said: list[list[int]] = [[] for _ in range(len(logits))]
        ended = [row < 0 for row in members]
        live = list(range(len(said)))  # slot at every place of the batch; a place may repeat a slot to fill up
        for step in range(limit):
            tokens = logits.argmax(-1)
            seen: set[int] = set()
            for slot, token in zip(live, tokens.tolist(), strict=True):
                if ended[slot] or slot in seen:
                    continue
                seen.add(slot)
                self.cost.new_tokens += 1
                if token in ends:
                    ended[slot] = True
                    continue
                said[slot].append(token)
                if stop is not None and pieces(token) and stop(self._text(said[slot])):
                    ended[slot] = True
            if step + 1 == limit or all(ended[slot] for slot in live):
                break
            places = memory.places([not ended[slot] for slot in live])
            if len(places) <= WORTH_MOVING * len(live):
                memory.keep(places)
                live = [live[place] for place in places]
                tokens = tokens[torch.tensor(places, device=tokens.device)]
            logits = memory.forward(tokens[:, None])
        return [(tuple(ids), end) for ids, end in zip(said, ended, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        decode = self.model.tokenizer.decode
        return str(decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _ends_clause(self, token: int) -> bool:
        known: dict[int, bool] = self.__dict__.setdefault("_clauses", {})
        if token not in known:
            known[token] = not STOP_MARKS.isdisjoint(self._text([token]))
        return known[token]


@runtime_checkable
class _Memory(Protocol):
    """Keys and values of one batch."""

    def forward(self, ids: Int[Tensor, "slot pos"]) -> Float[Tensor, "slot vocab"]: ...

    def places(self, live: Sequence[bool]) -> list[int]: ...

    def keep(self, places: Sequence[int]) -> None: ...


class _Expanded:
    """Every row has its own copy of its one prompt's cache, as transformers keeps it (windows cut off)."""

    def __init__(
        self, model: HookedModel, kept: Sequence[Any], lengths: Sequence[int], padding: Sequence[int], capacity: int
    ) -> None:
        self.model = model
        self.cache = copy.deepcopy(kept[0])
        self.cache.batch_repeat_interleave(len(padding))
        self.at = lengths[0]

    def forward(self, ids: Int[Tensor, "slot pos"]) -> Float[Tensor, "slot vocab"]:
        positions = torch.arange(self.at, self.at + ids.shape[1], device=ids.device).expand(ids.shape)
        self.at += ids.shape[1]
        return _logits(self.model, ids, positions, self.cache)

    def places(self, live: Sequence[bool]) -> list[int]:
        return [place for place, alive in enumerate(live) if alive]

    def keep(self, places: Sequence[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(places, device=self.model.device))


class _Cascade:
    """Slots in a grid, (prompt, candidate): prompts' keys and values once, and one own part per slot.

    Own parts are padded on the left: ``start`` is the first real column of a slot.
    """

    def __init__(
        self, model: HookedModel, kept: Sequence[Any], lengths: Sequence[int], padding: Sequence[int], capacity: int
    ) -> None:
        self.model = model
        self.layers = [_stacked([prompt[layer] for prompt in kept]) for layer in range(model.n_layers)]
        self._own_layers = [_OwnLayer(capacity) for _ in range(model.n_layers)]
        self.own = Cache(layers=list(self._own_layers))
        self.lengths = torch.tensor(list(lengths), device=model.device)
        self.start = torch.tensor(list(padding), device=model.device)
        self.filled = 0
        self.queries = 0
        self.windows: dict[int, int | None] = {}  # by layer, as the model's attention names them
        self._masks: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def group(self) -> int:
        """Candidates of a prompt."""
        return len(self.start) // len(self.lengths)

    def forward(self, ids: Int[Tensor, "slot pos"]) -> Float[Tensor, "slot vocab"]:
        self.queries = ids.shape[1]
        columns = torch.arange(self.filled, self.filled + self.queries, device=ids.device)
        self._own_positions = (columns - self.start[:, None]).clamp(min=0)
        positions = self._own_positions + self.lengths.repeat_interleave(self.group)[:, None]
        self._masks = {}
        with _attending(self):
            logits = _logits(self.model, ids, positions, self.own)
        self.filled += self.queries
        return logits

    def masks(self, window: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Who is seen: of the prompt (prompt, 1, candidate, 1, query, key), of the own part (slot, 1, 1, query, key).

        None where everything is. Made once per forward pass and window.
        """
        if window not in self._masks:
            device, n, group = self.start.device, self.filled + self.queries, self.group
            width = self.layers[0][0].shape[-2]
            keys = torch.arange(width, device=device)
            known = keys < self.lengths[:, None]  # (prompt, key)
            shared: Tensor | None = known[:, None, None, None, None] if not bool(known.all()) else None
            if window is not None:
                at = self._own_positions + self.lengths.repeat_interleave(group)[:, None]
                near = (at[..., None] - keys < window).reshape(-1, 1, group, 1, self.queries, width)
                shared = near if shared is None else near & shared
            columns = torch.arange(n, device=device)
            asking = columns[self.filled :, None]
            seen = columns <= asking
            if window is not None:
                seen = seen & (asking - columns < window)
            # A padded column sees itself alone among the own ones: what nobody reads must still be a number.
            real = (columns >= self.start[:, None])[:, None] & seen | (columns == asking)
            own = real[:, None, None] if not bool(real.all()) else None
            self._masks[window] = shared, own
        return self._masks[window]

    def places(self, live: Sequence[bool]) -> list[int]:
        """Places to keep so that live ones stay in a grid; a prompt with fewer repeats one of its own."""
        group = self.group
        rows = [[p for p in range(i * group, (i + 1) * group) if live[p]] for i in range(len(self.lengths))]
        rows = [row for row in rows if row]
        width = max(map(len, rows))
        return [place for row in rows for place in (row + row[:1] * (width - len(row)))]

    def keep(self, places: Sequence[int]) -> None:
        index = torch.tensor(list(places), device=self.start.device)
        prompts = list(dict.fromkeys(place // self.group for place in places))
        for layer in self._own_layers:
            layer.select(index)
        if len(prompts) < len(self.lengths):
            self.layers = [(keys[prompts], values[prompts]) for keys, values in self.layers]
            self.lengths = self.lengths[prompts]
        self.start = self.start[index]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` (slot, head, query, d) to its shared prompt and its own ``key`` and ``value``.

    Each part is a softmax of its own with maximum m and sum z; weighted by exp(m - max m) the sums and the outputs
    of the two add up to those of one softmax over both.
    """
    memory = _ATTENDING.get()
    unknown = [name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None]
    if memory is None or unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'no shared prompt'}")
    memory.windows[module.layer_idx] = sliding_window
    prompt_keys, prompt_values = memory.layers[module.layer_idx]
    slots, heads, length, _ = query.shape
    prompts, kv_heads, width, _ = prompt_keys.shape
    group, repeats = slots // prompts, heads // kv_heads
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    seen_prompt, seen_own = memory.masks(sliding_window)

    def scores(queries: Tensor, keys: Tensor, seen: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        found = (queries @ keys.transpose(-1, -2)).float()
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        if seen is not None:
            found = found.reshape(shape).masked_fill_(~seen, -torch.inf).reshape(found.shape)
        return found

    by_slot = query.reshape(slots, kv_heads, repeats * length, -1)
    by_prompt = by_slot.reshape(prompts, group, kv_heads, repeats * length, -1).transpose(1, 2)
    by_prompt = by_prompt.reshape(prompts, kv_heads, group * repeats * length, -1)
    shared = scores(by_prompt, prompt_keys, seen_prompt, (prompts, kv_heads, group, repeats, length, width))
    own = scores(by_slot, key, seen_own, (slots, kv_heads, repeats, length, key.shape[-2]))

    m_shared = shared.amax(-1, keepdim=True).clamp(min=-1e30)  # a window may have left the whole prompt behind
    shared = shared.sub_(m_shared).exp_()
    o_shared = shared.to(value.dtype) @ prompt_values
    m_own = own.amax(-1, keepdim=True)
    own = own.sub_(m_own).exp_()
    o_own = own.to(value.dtype) @ value

    def per_slot(x: Tensor) -> Tensor:
        return x.reshape(prompts, kv_heads, group, repeats * length, -1).transpose(1, 2).reshape(*by_slot.shape[:3], -1)

    m_shared, z_shared = per_slot(m_shared), per_slot(shared.sum(-1, keepdim=True))
    top = torch.maximum(m_shared, m_own)
    w_shared, w_own = (m_shared - top).exp(), (m_own - top).exp()
    total = z_shared * w_shared + own.sum(-1, keepdim=True) * w_own
    out = per_slot(o_shared) * (w_shared / total).to(value.dtype) + o_own * (w_own / total).to(value.dtype)
    return out.reshape(slots, heads, length, -1).transpose(1, 2).contiguous(), None


_ATTENDING: ContextVar[_Cascade | None] = ContextVar("shared prompts of the running forward pass", default=None)


@contextmanager
def _attending(memory: _Cascade) -> Iterator[None]:
    """The model's attention is :func:`attend` inside the block."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    config = text_config(memory.model.hf)
    before = config._attn_implementation
    token = _ATTENDING.set(memory)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _ATTENDING.reset(token)


class _OwnLayer(CacheLayerMixin):
    """A cache layer with room for ``capacity`` tokens from the start: growing by concatenation copies it each step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(x: Tensor) -> Tensor:
            return x.new_zeros((*x.shape[:2], self.capacity, x.shape[3]))

        self.keys, self.values, self.is_initialized = room(key_states), room(value_states), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._held()
        now = slice(self.filled, self.filled + key_states.shape[-2])
        keys[:, :, now], values[:, :, now] = key_states, value_states
        self.filled = now.stop
        return keys[:, :, : self.filled], values[:, :, : self.filled]

    def select(self, slots: Tensor) -> None:
        """Keep these slots, in this order."""
        keys, values = self._held()
        self.keys, self.values = keys[slots], values[slots]

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None  # initialised before anything is asked of it
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1


def _logits(model: HookedModel, ids: Tensor, positions: Tensor, cache: Any) -> Float[Tensor, "slot vocab"]:
    where = {"position_ids": positions} if model.takes_positions else {}
    last = {"logits_to_keep": 1} if model._head_takes_last else {}
    return model.hf(input_ids=ids, past_key_values=cache, use_cache=True, **where, **last).logits[:, -1]


def _prompt_cache(model: HookedModel, prompt: tuple[int, ...]) -> Any:
    """The cache after one prompt, as transformers lays it out for this model."""
    cache = DynamicCache(config=model.hf.config)
    if prompt:
        ids = torch.tensor([prompt], device=model.device)
        where = {"position_ids": torch.arange(len(prompt), device=model.device)[None]} if model.takes_positions else {}
        model.base(input_ids=ids, past_key_values=cache, use_cache=True, **where)
    return cache


def _prompt_layers(model: HookedModel, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[Layer]]:
    """Keys and values of every prompt by layer, all of them whatever the window; read in padded batches."""
    out = {}
    for order in token_budget_batches([len(p) for p in prompts], model.token_budget):
        rows = [Rendered("", "", prompts[i], ("template",) * len(prompts[i])) for i in order]
        cache: Any = DynamicCache()  # without the configuration no layer forgets what left its window
        model.base(**(model.inputs(model.batch(rows)) | {"past_key_values": cache, "use_cache": True}))
        for i, row in enumerate(rows):
            pairs = [(layer.keys[i, :, : len(row)], layer.values[i, :, : len(row)]) for layer in cache.layers]
            out[row.ids] = [(keys.clone(), values.clone()) for keys, values in pairs]
    return out


def _stacked(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """One layer of several prompts, padded on the right: (prompt, kv_head, key, d_head)."""
    if len(layers) == 1:
        return layers[0][0][None], layers[0][1][None]
    width = max(keys.shape[1] for keys, _ in layers)

    def stack(parts: Sequence[Tensor]) -> Tensor:
        out = parts[0].new_zeros((len(parts), parts[0].shape[0], width, parts[0].shape[2]))
        for i, part in enumerate(parts):
            out[i, :, : part.shape[1]] = part
        return out

    return stack([keys for keys, _ in layers]), stack([values for _, values in layers])


def _bytes(kept: Any) -> int:
    layers = kept if isinstance(kept, list) else [(layer.keys, layer.values) for layer in kept.layers]
    return sum(x.nbytes for pair in layers for x in pair if x is not None)


def shared_length(row: Rendered) -> int:
    """How much of a row belongs to its prompt: all before the injected prefix, and never the last token."""
    first = row.roles.index("prefix") if "prefix" in row.roles else len(row)
    return min(first, len(row) - 1)


def _check_length(rows: Sequence[Rendered]) -> None:
    for row in rows:
        if len(row) < 2:
            raise UserError(f"prompt {row.id!r}: one token leaves no prompt to share; give at least two")


def _plan(
    rows: Sequence[Rendered], new_tokens: int, budget: int, *, ragged: bool
) -> Iterator[tuple[list[tuple[int, ...]], list[int], list[tuple[int, ...]]]]:
    """Batches as (prompts, row of every slot, own ids of every slot); slots are a grid of prompts x candidates.

    Without ``ragged`` a batch has one prompt, and own parts of one length.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.ids[: shared_length(row)], []).append(i)

    def own(i: int) -> tuple[int, ...]:
        return rows[i].ids[shared_length(rows[i]) :]

    def room(width: int) -> int:
        return max(1, budget // (width + new_tokens))

    # With rows enough to fill several batches, prefixes of about one length go together: less padding is computed.
    spread = 1.3 if len(rows) >= MANY_ROWS else math.inf
    pieces: list[tuple[tuple[int, ...], list[int]]] = []
    for prompt, members in groups.items():
        members = sorted(members, key=lambda i: len(own(i)))
        while members:
            widest = spread * len(own(members[0])) if ragged else len(own(members[0]))
            n = sum(len(own(i)) <= widest for i in members)
            while n > room(len(own(members[n - 1]))):
                n -= 1
            pieces.append((prompt, members[:n]))
            members = members[n:]
    # Alike side by side, so that grids have few empty places and prompts little padding.
    wide = (lambda piece: len(own(piece[1][-1]))) if spread < math.inf else (lambda piece: 0)
    pieces.sort(key=lambda piece: (wide(piece), -len(piece[1]), len(piece[0])))
    while pieces:
        taken: list[tuple[tuple[int, ...], list[int]]] = []
        width, height, n = 0, len(pieces[0][1]), 0
        limit = spread * len(own(pieces[0][1][-1])) if ragged else 0
        for prompt, members in pieces:
            width = max(width, len(own(members[-1])))
            full = (len(taken) + 1) * height > room(width)
            unlike = width > limit or not height / 2 <= len(members) <= height
            if taken and (full or unlike):
                break
            taken.append((prompt, members))
            n += 1
        pieces = pieces[n:]
        slots = [i for _, members in taken for i in [*members, *[-1] * (height - len(members))]]
        filled = [m for _, members in taken for m in [*members, *members[:1] * (height - len(members))]]
        yield [prompt for prompt, _ in taken], slots, [own(i) for i in filled]


def _left_padded(parts: Sequence[tuple[int, ...]], pad: int) -> tuple[Int[Tensor, "slot pos"], list[int]]:
    width = max(map(len, parts))
    padding = [width - len(part) for part in parts]
    return torch.tensor([[pad] * gap + list(part) for gap, part in zip(padding, parts, strict=True)]), padding


def _trial(model: HookedModel) -> str:
    """Why cascade attention fails on this model: compared with the model's own logits on two short prompts."""
    if not model.takes_positions:
        return "its forward pass takes no positions"
    layers = DynamicCache(config=model.hf.config).layers
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    odd = sorted({type(layer).__name__ for layer in layers} - {kind.__name__ for kind in known})
    if odd:
        return f"its cache has layers of another kind ({', '.join(odd)})"
    n = model.vocab_size
    prompts = [tuple((7 * i + 3) % n for i in range(9)), tuple((5 * i + 1) % n for i in range(6))]
    own = [((11 + i) % n, (17 * i + 5) % n, (2 * i + 1) % n)[: 2 + i % 2] for i in range(4)]
    texts = [prompts[i // 2] + part for i, part in enumerate(own)]
    rows = [Rendered("", "", ids, ("template",) * len(ids)) for ids in texts]
    try:
        with model.evaluating(), torch.no_grad():
            kept = _prompt_layers(model, prompts)
            ids, padding = _left_padded(own, model.pad_id)
            memory = _Cascade(model, [kept[p] for p in prompts], [len(p) for p in prompts], padding, ids.shape[1])
            got = memory.forward(ids.to(model.device)).float().cpu()
    except torch.OutOfMemoryError:  # says nothing about the attention
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign attention raises, its copies work
        return f"its attention cannot be replaced ({type(error).__name__}: {str(error)[:120]})"
    windows = [memory.windows.get(layer) is not None for layer in range(model.n_layers)]
    sliding = [isinstance(layer, DynamicSlidingWindowLayer) for layer in layers]
    if sliding and windows != sliding:
        return "its attention does not say which layers have a window"
    want = model.next_token_logits(rows)
    tolerance = 1e-3 if next(model.hf.parameters()).dtype == torch.float32 else 5e-2
    gap = (got[:, :n] - want).abs().max() / want.abs().max()
    return "" if gap < tolerance else f"its logits with a shared prompt are off by {gap:.1e} of the largest"
