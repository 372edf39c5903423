"""Greedy generation for many answers to few prompts: a prompt is read once and its keys and values are shared.

Rows that differ only in their injected prefix have a prompt in common. Its keys and values are kept once, also for
later calls, and every row attends to them and to its own prefix and answer (:mod:`interp.generate.cascade`). Models
whose
attention cannot be replaced get copies of the prompt's cache instead.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.generate.cascade import Cascade, left_padded, next_logits, prompt_layers, why_not
from pingscope.interp.generate.generation import Generation, end_ids
from pingscope.interp.model.check import check_best
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.recent import Recent

ROW_BUDGET = 32_768  # slots (rows x longest prefix and answer) of one batch
MEMORY = 1 << 30  # bytes of prompts kept for later calls
LOGITS = 1 << 28  # numbers of one batch's logits, where those of many positions are wanted
MANY_ROWS = 512
WORTH_MOVING = 0.75  # finished rows leave the batch when it shrinks to this share
STOP_MARKS = frozenset(")>}`\n.!?")  # an outcome is decided at one of these

Stop = Callable[[str], bool]


@dataclass
class _Cost:
    """What was computed: prompt tokens read, prefix tokens read, tokens generated."""

    prompt_tokens: int = 0
    prefix_tokens: int = 0
    new_tokens: int = 0


class SharedPrefill:
    """Continues rows greedily; the same ids as :func:`pingscope.interp.generate.generation.generate`, token for token.

    Args:
        sharing: ``cascade``, ``expanded`` (every row has a copy of its prompt's cache), or ``auto``: cascade where a
            trial gives the model's own logits. :attr:`problem` says why it does not. A model that keeps no keys and
            values (Mamba, RWKV) reads every row whole, again for every token.
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
        found = why_not(self.model)
        if found:
            instead = "every row gets a copy of its prompt" if self.model.keeps_keys else "every row is read whole"
            warnings.warn(f"{self.model.name}: {found}; {instead}, which is slower", stacklevel=2)
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
            found = logits[slots, -1][:, kept.to(logits.device)]
            out[[members[slot] for slot in slots]] = found.float().cpu()
        return out

    def answer_log_probs(
        self, rows: Sequence[Rendered], answers: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """How likely a given answer is after every row, in nats, and whether greedy decoding would give it.

        Nothing is generated: the answer is read behind the row's own part, all rows of a prompt together.

        Raises:
            UserError: a row without an injected prefix, or an answer without a token.
        """
        for row, answer in zip(rows, answers, strict=True):
            if "prefix" not in row.roles or not answer:
                raise UserError(f"prompt {row.id!r}: an answer is read behind an injected prefix; give both")
        whole = [
            Rendered(row.id, row.label, row.ids + tuple(answer), row.roles + ("answer",) * len(answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
        self.model.check_context(whole)
        longest = max(map(len, answers), default=0)
        likely, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        for members, _, logits in self._batches(whole, 1, last=longest + 1):
            slots = [slot for slot, row in enumerate(members) if row >= 0]
            at = [members[slot] for slot in slots]
            said, padding = left_padded([tuple(answers[row]) for row in at], 0)
            said = said.to(logits.device)
            real = torch.arange(said.shape[1], device=said.device) >= torch.tensor(padding, device=said.device)[:, None]
            found = logits[slots, -1 - said.shape[1] : -1].float().log_softmax(-1)
            log_probs = found.gather(-1, said[..., None])[..., 0]
            likely[at] = log_probs.masked_fill(~real, 0.0).sum(-1).cpu()
            greedy[at] = ((found.argmax(-1) == said) | ~real).all(-1).cpu()
        return likely, greedy

    def _batches(
        self, rows: Sequence[Rendered], new_tokens: int, last: int = 1
    ) -> Iterator[tuple[list[int], _Memory, Float[Tensor, "slot last vocab"]]]:
        """Batches as (row of every slot, or -1; the cache after the own parts; logits of their last positions)."""
        budget = self.row_budget if last == 1 else min(self.row_budget, LOGITS // self.model.vocab_size)
        fingerprint = self.model.fingerprint
        if fingerprint != self._fingerprint:  # a training step makes every kept prompt stale
            self._kept, self._fingerprint = Recent(self.memory), fingerprint
        cascade = self.sharing == "cascade"
        with self.model.evaluating(), torch.no_grad():
            for prompts, members, own in _plan(rows, new_tokens, budget, ragged=cascade):
                kept = self._read(prompts)
                ids, padding = left_padded(own, self.model.pad_id)
                copies = _Expanded if self.model.keeps_keys else _Whole
                kind: Callable[..., _Memory] = Cascade if cascade else copies
                memory = kind(self.model, kept, [len(p) for p in prompts], padding, ids.shape[1] + new_tokens)
                logits = memory.forward(ids.to(self.model.device), last)
                real = [slot for slot, row in enumerate(members) if row >= 0]
                ids_of = [rows[members[slot]].id for slot in real]
                check_best(self.model.name, ids_of, logits[:, -1].amax(-1)[real])
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
            found |= prompt_layers(self.model, fresh)
        for prompt in fresh:
            self._kept.put(prompt, found[prompt], _bytes(found[prompt]))
        return [found[prompt] for prompt in prompts]

    def _decode(
        self,
        members: Sequence[int],
        memory: _Memory,
        logits: Float[Tensor, "slot last vocab"],
        limit: int,
        stop: Stop | None,
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Greedy ids of every slot, and whether each ended (by an end token or ``stop``); empty slots say nothing."""
        ends, pieces = set(end_ids(self.model)), self._ends_clause
        said: list[list[int]] = [[] for _ in range(len(logits))]
        ended = [row < 0 for row in members]
        live = list(range(len(said)))  # slot at every place of the batch; a place may repeat a slot to fill up
        for step in range(limit):
            tokens = logits[:, -1].argmax(-1)
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

    def forward(self, ids: Int[Tensor, "slot pos"], last: int = 1) -> Float[Tensor, "slot last vocab"]: ...

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

    def forward(self, ids: Int[Tensor, "slot pos"], last: int = 1) -> Float[Tensor, "slot last vocab"]:
        positions = torch.arange(self.at, self.at + ids.shape[1], device=ids.device).expand(ids.shape)
        self.at += ids.shape[1]
        return next_logits(self.model, ids, positions, self.cache, last)

    def places(self, live: Sequence[bool]) -> list[int]:
        return [place for place, alive in enumerate(live) if alive]

    def keep(self, places: Sequence[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(places, device=self.model.device))


class _Whole:
    """The text of every row, read anew in every pass."""

    def __init__(
        self, model: HookedModel, kept: Sequence[Any], lengths: Sequence[int], padding: Sequence[int], capacity: int
    ) -> None:
        self.model = model
        self.text = torch.tensor([kept[0]] * len(padding), dtype=torch.long, device=model.device)

    def forward(self, ids: Int[Tensor, "slot pos"], last: int = 1) -> Float[Tensor, "slot last vocab"]:
        self.text = torch.cat([self.text, ids], 1)
        kept = {"logits_to_keep": last} if self.model.head_takes_last else {}
        return self.model.hf(input_ids=self.text, use_cache=False, **kept).logits[:, -last:]

    def places(self, live: Sequence[bool]) -> list[int]:
        return [place for place, alive in enumerate(live) if alive]

    def keep(self, places: Sequence[int]) -> None:
        self.text = self.text[list(places)]


def _prompt_cache(model: HookedModel, prompt: tuple[int, ...]) -> Any:
    """The cache after one prompt, as transformers lays it out for this model; its ids, where it has none."""
    if not model.keeps_keys:
        return prompt
    cache = DynamicCache(config=model.hf.config)
    if prompt:
        ids = torch.tensor([prompt], device=model.device)
        where = {"position_ids": torch.arange(len(prompt), device=model.device)[None]} if model.takes_positions else {}
        model.base(input_ids=ids, past_key_values=cache, use_cache=True, **where)
    return cache


def _bytes(kept: Any) -> int:
    if isinstance(kept, tuple):
        return 8 * len(kept)
    layers = kept if isinstance(kept, list) else [tuple(vars(layer).values()) for layer in kept.layers]
    return sum(x.nbytes for parts in layers for x in parts if isinstance(x, Tensor))


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
