"""Reading and editing the residual stream: the only file that touches module hooks.

A hook never guesses from tensor shapes where it is: it asks the :class:`pingscope.interp.model.clock.Clock` of the
forward pass. So an edit lands on the same tokens with and without a KV cache, in chunks, padded on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of
from pingscope.interp.model.clock import Clock
from pingscope.interp.model.components import Part, module_of
from pingscope.interp.model.contract import Model
from pingscope.interp.model.selection import EMBED, Selection

Rows = Float[Tensor, "row d_model"]
Sink = Callable[[int, Float[Tensor, "batch pos d_model"]], None]
Site = tuple[int, Part]  # a layer, and what of it


@runtime_checkable
class Handle(Protocol):
    """What a registered hook is removed by."""

    def remove(self) -> None: ...


@runtime_checkable
class Watch(Protocol):
    """Follows one batch: reads the stream at a condition's layer and tokens, and says where it is open."""

    def see(self, rows: Tensor, positions: Tensor, states: Tensor) -> None:
        """Row number and absolute position of every token read in this pass, and its state (token, d_model)."""

    def open(self, rows: Tensor, positions: Tensor) -> Tensor:
        """One flag a token, by its row and position. Every row is closed before its first evidence."""

    @property
    def opened(self) -> Tensor:
        """One flag a row: where the latest decision was to open."""


@runtime_checkable
class Condition(Protocol):
    """Decides, row by row and in the same forward pass, whether an edit is applied. See :mod:`steering.gates`."""

    @property
    def layer(self) -> int: ...

    @property
    def where(self) -> Selection: ...

    def watch(self, rows: Sequence[Rendered]) -> Watch:
        """A fresh watch over one batch, in its order of rows."""

    def identity(self) -> list[Any]:
        """What the condition is, as data to hash."""


@dataclass(frozen=True)
class Edit:
    """Replace the residual stream after ``layer`` by ``fn`` of itself at the selected tokens.

    ``fn`` takes and returns (row, d_model), one row per selected token, and must not change its input.
    Layer -1 is the stream before block 0. ``part`` edits what a component of that layer writes instead; a row of
    ``heads`` is what all heads feed to the output projection, (n_heads x head size) wide. With ``when`` the edit
    touches only the rows on which that condition is open (:func:`check_conditions`: which placements are possible).
    """

    layer: int
    where: Selection
    fn: Callable[[Float[Tensor, "row width"]], Float[Tensor, "row width"]]
    part: Part = "residual"
    when: Condition | None = None

    def bind(self, rows: Sequence[Rendered]) -> Edit:
        """The edit for one batch, in its order of rows; an edit that depends on the prompt overrides this."""
        return self

    @property
    def reads_prompt(self) -> bool:
        """Whether the change depends on the model's own states at other tokens, so that those must be computed anew
        in every pass. Taken to be so of kinds of edits that do not say otherwise.
        """
        return type(self) is not Edit

    def identity(self, width: int) -> list[Any]:
        """What the edit does, as data to hash. Functions cannot be compared, so it is known by its place and by what
        it makes of fixed rows of ``width`` numbers at sizes from 0.01 to 100.
        """
        draw = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
        made = self.fn(draw * torch.logspace(-2, 2, 16)[:, None])
        known = [self.layer, self.part, str(self.where), sha256_of(made.float().numpy().tobytes())]
        return known if self.when is None else [*known, self.when.identity()]


class Stop(Exception):
    """Ends a forward pass once the deepest wanted layer has been read."""


def matches(where: Selection, rows: Sequence[Rendered], new_tokens: int = 0) -> bool:
    """Whether a selection can touch any token of ``rows`` or of ``new_tokens`` generated ones."""
    if any(any(where.mask(row)) for row in rows):
        return True
    return any(
        bool(where.generated_mask(torch.arange(len(row) - row.n_prompt, len(row) - row.n_prompt + new_tokens)).any())
        for row in rows
    )


def live_edits(edits: Sequence[Edit], rows: Sequence[Rendered], new_tokens: int = 0) -> list[Edit]:
    """The edits that can act on ``rows``: their tokens are there, and so are those that their condition reads."""
    return [
        e
        for e in edits
        if matches(e.where, rows, new_tokens) and (e.when is None or matches(e.when.where, rows, new_tokens))
    ]


def check_edits(model: Model, edits: Sequence[Edit], rows: Sequence[Rendered], new_tokens: int = 0) -> None:
    """Refuse edits that would silently do nothing, before any forward pass."""
    for e in edits:
        if not EMBED <= e.layer < model.n_layers:
            raise UserError(f"edit at layer {e.layer}: the model has layers 0-{model.n_layers - 1} (and embed, -1)")
        if not matches(e.where, rows, new_tokens):
            raise UserError(f"edit at layer {e.layer}: selection '{e.where}' matches no token of the prompts")
    check_conditions(edits, rows, new_tokens)


def check_conditions(edits: Sequence[Edit], rows: Sequence[Rendered], new_tokens: int = 0) -> None:
    """Refuse conditional edits that would come before what decides on them, or change what is read.

    A condition is read in the very pass that it decides on. So an edit of prompt tokens lies at the condition's layer
    or above it. An edit of generated tokens alone may lie at any layer, unless the condition goes on reading generated
    tokens: it must never read what its own edit did.
    """
    for e in edits:
        if e.when is None:
            continue
        gate, name = e.when, f"edit at layer {e.layer} (selection '{e.where}')"
        if not matches(gate.where, rows, new_tokens):
            raise UserError(f"{name}: its gate reads '{gate.where}', which matches no token of the prompts")
        if e.layer > gate.layer or (e.layer == gate.layer and e.part == "residual"):
            continue
        of_prompt = any(any(e.where.mask(row)[: row.n_prompt]) for row in rows)
        streaming = bool(gate.where.generated_mask(torch.arange(max(new_tokens, 1))).any())
        if of_prompt or streaming:
            raise UserError(
                f"{name}: its gate reads layer {gate.layer} and cannot act below it in one pass; edit layers from "
                f"{gate.layer} on, or 'generated[0:]' behind a gate that reads the prompt alone"
            )


@contextmanager
def edit(
    model: Model,
    rows: Sequence[Rendered],
    edits: Sequence[Edit],
    new_tokens: int = 0,
    watched: Sequence[Condition] = (),
) -> Iterator[list[Watch]]:
    """Apply ``edits`` to every forward pass of ``model`` inside the block.

    Args:
        rows: the prompts of the batch, in its order; the forward pass must be given their mask if padded.
        new_tokens: how many tokens may be generated after them.
        watched: conditions to follow though no edit depends on them; the block gives their watches, in this order.

    Hooks of this block alone are removed on leaving it, also after an exception. Tensors are never changed in
    place.

    Raises:
        UserError: a layer the model lacks, a selection that matches nothing, a forward pass of another batch
            size, or one that skipped positions to be edited (a cache filled beforehand).
    """
    if not edits and not watched:
        yield []
        return
    check_edits(model, edits, rows, new_tokens)
    bound = [e.bind(rows) for e in edits]
    conditions = list({id(c): c for c in (*(e.when for e in bound), *watched) if c is not None}.values())
    at_work = _AtWork(
        clock=Clock(model.base, rows, {e.where for e in bound} | {c.where for c in conditions}),
        edits=bound,
        watches={id(condition): condition.watch(rows) for condition in conditions},
        touched=[0] * len(bound),
    )
    handles: list[Handle] = []
    try:
        handles.append(model.base.register_forward_pre_hook(at_work.clock.read, with_kwargs=True))
        for condition in conditions:  # before the edits: a gate reads its layer as it was
            handles.append(model.on_residual(condition.layer, partial(at_work.read, condition)))
        for number, e in enumerate(bound):
            handles.append(on_part(model, e.layer, e.part, partial(at_work.apply, number)))
        yield [at_work.watches[id(condition)] for condition in watched]
        at_work.check_complete(rows)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _AtWork:
    """What the hooks of one block share: where the forward pass is, and what was done so far."""

    clock: Clock
    edits: Sequence[Edit]
    watches: Mapping[int, Watch]  # by the identity of their condition
    touched: list[int]  # prompt positions by edit

    def read(self, condition: Condition, x: Tensor) -> None:
        index, _ = self.clock.selected(condition.where)
        if len(index[0]):
            here = tuple(i.to(x.device) for i in index)
            self.watches[id(condition)].see(index[0], self.clock.positions[index], x[here])

    def apply(self, number: int, given: Tensor) -> Tensor | None:
        e, clock = self.edits[number], self.clock
        x = given if given.ndim == 3 else given.reshape(*clock.shape, -1)  # some write (batch * pos, d_model)
        if x.shape[:2] != clock.shape:
            raise UserError(
                f"edit at layer {e.layer}: the block sees {tuple(x.shape[:2])} tokens, the model "
                f"{clock.shape}; run the whole model inside the block"
            )
        index, in_prompt = clock.selected(e.where)
        if not len(index[0]):
            return None
        self.touched[number] += in_prompt
        if e.when is not None:
            acting = self.watches[id(e.when)].open(index[0], clock.positions[index]).to(index[0].device)
            if not acting.any():
                return None
            index = tuple(i[acting] for i in index)
        index = tuple(i.to(x.device) for i in index)
        old = x[index]
        new = e.fn(old)
        if new.shape != old.shape:
            raise UserError(f"edit at layer {e.layer}: fn returned shape {tuple(new.shape)}, not {tuple(old.shape)}")
        return x.index_put(index, new.to(x)).reshape(given.shape)

    def check_complete(self, rows: Sequence[Rendered]) -> None:
        """Every selected prompt position was edited; a cache filled beforehand would have hidden some."""
        for e, done in zip(self.edits, self.touched, strict=True):
            wanted = sum(map(sum, (e.where.mask(row) for row in rows)))
            if self.clock.ticks and done < wanted:
                raise UserError(
                    f"edit at layer {e.layer}: applied to {done} of {wanted} tokens of the prompts; "
                    "run the whole prompt inside the block, without a cache filled before"
                )


@contextmanager
def capture(model: Model, layers: Sequence[int], sink: Sink, *, stop: bool = True) -> Iterator[None]:
    """Give ``sink(layer, residual)`` the stream after each wanted layer during forward passes in the block.

    The residual has shape (batch, pos, d_model) and is a view of the live one: copy what is to be kept. With
    ``stop`` the forward pass ends after the deepest wanted layer (and the block with it).
    """
    handles: list[Handle] = []
    deepest = max(layers)

    def read(layer: int, x: Float[Tensor, "batch pos d_model"]) -> None:
        sink(layer, x)
        if stop and layer == deepest:
            raise Stop

    try:
        for layer in sorted(layers):
            handles.append(model.on_residual(layer, partial(read, layer)))
        yield
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tap(model: Model, sites: Sequence[Site], visit: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``visit(site, x)`` at every site during forward passes in the block; what it returns replaces ``x``.

    ``x`` is live, (batch, pos, width) or (batch * pos, width): copy what is to be kept.
    """
    handles: list[Handle] = []
    try:
        for site in sites:
            handles.append(on_part(model, *site, partial(visit, site)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_part(model: Model, layer: int, part: Part, function: Callable[[Tensor], Tensor | None]) -> Handle:
    """Call ``function`` on a part of a layer; what it returns replaces it, None keeps it."""
    if part == "residual":
        return model.on_residual(layer, function)
    module, side = module_of(model, layer, part)
    return (on_input if side == "input" else on_output)(module, function)


def on_residual(
    blocks: Sequence[nn.Module], layer: int, function: Callable[[Tensor], Tensor | None], axis: int | None = None
) -> Handle:
    """Call ``function`` on the stream after ``layer``; what it returns replaces the stream, None keeps it.

    The one place that knows how blocks take the stream in: as their first argument or as ``hidden_states``
    (before block 0 position embeddings and scaling are in it already). Several streams, along ``axis``, are given
    as one, see :func:`side_by_side`.
    """

    def change(x: Any) -> Tensor | None:
        changed = function(check_residual(layer, side_by_side(x, axis)))
        return changed if changed is None or axis is None else apart(changed, x, axis)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = change(args[0] if args else kwargs.get("hidden_states"))
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    if layer == EMBED:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return on_output(blocks[layer], change)


def side_by_side(x: Any, axis: int | None) -> Any:
    """Several residual streams as one (batch, pos, streams x d_model): hyper-connections keep them along axis 2
    (DeepSeek V4; Zhu et al. 2024), AltUp along axis 0 (Gemma 3n; Baykal et al. 2023).
    """
    if axis is None or not isinstance(x, Tensor) or x.ndim != 4:
        return x
    return x.movedim(axis, 2).flatten(2)


def apart(x: Float[Tensor, "batch pos width"], like: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`side_by_side`."""
    return x.unflatten(2, (like.shape[axis], like.shape[-1])).movedim(2, axis)


def on_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Handle:
    """Call ``function`` on what a module puts out: a tensor, or the first of several. None keeps it."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if hasattr(output, "_fields"):
            raise UserError(f"{type(module).__name__} passes on {' and '.join(output._fields)}, not one stream")
        nested = isinstance(output, tuple | list)
        changed = function(output[0] if nested else output)
        if changed is None:
            return None
        return type(output)((changed, *output[1:])) if nested else changed

    return module.register_forward_hook(after)


def on_input(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Handle:
    """Call ``function`` on the first argument of a module; what it returns replaces it, None keeps it."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = function(args[0])
        return None if changed is None else (changed, *args[1:])

    return module.register_forward_pre_hook(before)


def check_residual(layer: int, x: Any) -> Float[Tensor, "batch pos d_model"]:
    """``x`` itself, if it can be a residual stream."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise UserError(
            f"layer {layer}: expected a residual of shape (batch, pos, d_model), got "
            f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}; pass --blocks (blocks=…) for it"
        )
    return x
