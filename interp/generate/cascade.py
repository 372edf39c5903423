"""Attention in two parts: a prompt's keys once for all rows that share it, and every row's own.

Each part is a softmax of its own; merged by their log-sum-exp (cascade attention) they are that of plain attention.
Positions, not slots, decide what a query may see: windows are exact, also for own parts of different lengths in one
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pingscope.interp.chat.batching import token_budget_batches
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.model.discovery import text_config
from pingscope.interp.model.hooked import HookedModel

NAME = "pingscope_shared_prefill"  # of the attention function, in the registry of transformers

Layer = tuple[Float[Tensor, "kv_head _ d_head"], Float[Tensor, "kv_head _ d_head"]]


class Cascade:
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

    def forward(self, ids: Int[Tensor, "slot pos"], last: int = 1) -> Float[Tensor, "slot last vocab"]:
        """Logits at the ``last`` positions of ``ids``, which join the own parts."""
        self.queries = ids.shape[1]
        columns = torch.arange(self.filled, self.filled + self.queries, device=ids.device)
        self._own_positions = (columns - self.start[:, None]).clamp(min=0)
        positions = self._own_positions + self.lengths.repeat_interleave(self.group)[:, None]
        self._masks = {}
        with _attending(self):
            logits = next_logits(self.model, ids, positions, self.own, last)
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


_ATTENDING: ContextVar[Cascade | None] = ContextVar("shared prompts of the running forward pass", default=None)


@contextmanager
def _attending(memory: Cascade) -> Iterator[None]:
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


def prompt_layers(model: HookedModel, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[Layer]]:
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


def left_padded(parts: Sequence[tuple[int, ...]], pad: int) -> tuple[Int[Tensor, "slot pos"], list[int]]:
    width = max(map(len, parts))
    padding = [width - len(part) for part in parts]
    return torch.tensor([[pad] * gap + list(part) for gap, part in zip(padding, parts, strict=True)]), padding


def next_logits(
    model: HookedModel, ids: Tensor, positions: Tensor, cache: Any, last: int
) -> Float[Tensor, "slot last vocab"]:
    where = {"position_ids": positions} if model.takes_positions else {}
    kept = {"logits_to_keep": last} if model.head_takes_last else {}
    return model.hf(input_ids=ids, past_key_values=cache, use_cache=True, **where, **kept).logits[:, -last:]


def why_not(model: HookedModel) -> str:
    """Why cascade attention fails on this model: compared with the model's own logits on two short prompts."""
    if not model.keeps_keys:
        return "it keeps no keys and values"
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
            kept = prompt_layers(model, prompts)
            ids, padding = left_padded(own, model.pad_id)
            memory = Cascade(model, [kept[p] for p in prompts], [len(p) for p in prompts], padding, ids.shape[1])
            got = memory.forward(ids.to(model.device))[:, -1].float().cpu()
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
