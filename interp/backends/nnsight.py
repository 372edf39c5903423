"""nnsight behind the contract: reads and edits inside a trace, here or on NDIF (``remote=True``).

A trace may run on another machine, where hooks of this process are not. So everything that decides *where* an
edit lands is worked out beforehand: generation is a known sequence of forward passes, each over known columns,
and every pass gets its row and column indices as plain tensors.
"""

from __future__ import annotations

import copy as copying
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pingscope.interp.chat.batching import Batch
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.hooks import Edit, Sink, matches
from pingscope.interp.model.selection import EMBED, Selection

Index = tuple[Tensor, Tensor]
Moves = dict[int, list[tuple[Index, Callable[[Tensor], Tensor]]]]  # layer → (rows and columns, function), in order


class TracedModel(HookedModel):
    """A model read through nnsight (``traced``, a ``TransformersModel``).

    Args:
        remote: ``True`` runs every trace on NDIF, with weights that are never here; ``"local"`` serialises each
            trace as for NDIF and runs it in this process.

    Edits are functions sent with the trace: on NDIF they must need nothing but torch.
    """

    backend = "nnsight"

    def __init__(
        self,
        traced: Any,
        tokenizer: Any,
        name: str | None = None,
        *,
        remote: bool | str = False,
        blocks: str | None = None,
    ) -> None:
        self.traced = traced
        self.remote = remote
        super().__init__(traced._module, tokenizer, name, blocks=blocks)
        self.envoys = list(attrgetter(self.family.blocks)(traced))
        if remote:
            import nnsight

            nnsight.register("pingscope")  # not installed there: travels as source

    def read(self, batch: Batch, layers: Sequence[int], sink: Sink, edits: Sequence[Edit] = ()) -> None:
        import nnsight

        live = [e for e in edits if e.layer <= max(layers) and matches(e.where, batch.rows)]
        moves = _moves(batch, live, [(0, batch.ids.shape[1])])[0]
        given, envoys, wanted = self._given(batch), self.envoys, tuple(sorted(layers))
        with self._traces(), self.traced.trace(given, use_cache=False, remote=self.remote) as tracer:
            kept = run_through(envoys, moves, wanted)
            nnsight.save(kept)
            tracer.stop()
        for layer, x in zip(wanted, kept, strict=True):
            sink(layer, x)

    def last_logits(self, batch: Batch, edits: Sequence[Edit] = (), past: None = None) -> Float[Tensor, "row vocab"]:
        moves = _moves(batch, edits, [(0, batch.ids.shape[1])])[0]
        given, envoys, traced = self._given(batch), self.envoys, self.traced
        last = {"logits_to_keep": 1} if self.head_takes_last else {}
        with self._traces(), traced.trace(given, use_cache=False, remote=self.remote, **last):
            run_through(envoys, moves, ())
            logits = traced.output.logits[:, -1].save()
        return logits

    def continuations(
        self, batch: Batch, settings: Any, edits: Sequence[Edit] = (), past: None = None
    ) -> Int[Tensor, "row new"]:
        width = batch.ids.shape[1]
        passes = _passes(width, settings.max_new_tokens, settings.use_cache, settings.prefill_chunk_size)
        moves = _moves(batch, edits, passes, settings.max_new_tokens)
        given = {"input_ids": batch.ids, "attention_mask": batch.mask}
        envoys, n = self.envoys, len(passes)
        own = self.hf.generation_config
        self.hf.generation_config = settings  # as in the class above; a remote model keeps its own
        # An answer that ends early leaves the loop waiting, so what follows the loop has an invoke of its own. No
        # comment may stand between the two: a trace is sent without them, and its lines are counted.
        try:
            with self._traces(), self.traced.generate(generation_config=settings, remote=self.remote) as tracer:
                with tracer.invoke(given):
                    for step in tracer.iter[0:n]:
                        run_through(envoys, moves[step], ())
                with tracer.invoke():
                    ids = tracer.result.save()
        finally:
            self.hf.generation_config = own
        return ids[:, width:].to(batch.ids.device)

    def _given(self, batch: Batch) -> dict[str, Tensor]:
        return {key: x for key, x in self.inputs(batch).items() if isinstance(x, Tensor)}

    @contextmanager
    def _traces(self) -> Iterator[None]:
        from huggingface_hub.errors import HFValidationError
        from nnsight.intervention.backends.remote import RemoteError

        # Of the network, the hub or the server: an OSError of a trace that runs here is its own.
        failures = (RemoteError, HFValidationError, OSError) if self.remote is True else (RemoteError,)
        with warnings.catch_warnings(), self.evaluating():
            warnings.filterwarnings("ignore", message=".*was never reached")  # an answer that ended early
            try:
                yield
            except failures as error:
                reason = " ".join(str(error).split())[:240]
                raise UserError(
                    f"{self.name}: NDIF did not run the trace ({reason}); check the network, NDIF_API_KEY and that "
                    "the model is a hub id that is hosted, or use remote=False"
                ) from error


def trace_model(model: HookedModel) -> Any:
    """nnsight's wrapper around a loaded model, which stays plain."""
    from nnsight.modeling.transformers import TransformersModel

    # It sets its tokenizer to pad on the left.
    with _quiet_pipeline():
        return TransformersModel(model.hf, tokenizer=copying.deepcopy(model.tokenizer), task="text-generation")


@contextmanager
def _quiet_pipeline() -> Iterator[None]:
    """The pipeline that nnsight wraps lists every model it knows when it is given a vision-language one."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def remote_model(name: str, tokenizer: Any, revision: str | None, blocks: str | None = None) -> TracedModel:
    """A model that runs on NDIF: its modules without weights here.

    Raises:
        UserError: a configuration that cannot be read.
    """
    from nnsight.modeling.transformers import TransformersModel

    try:
        traced = TransformersModel(
            name, revision=revision, tokenizer=copying.deepcopy(tokenizer), task="text-generation"
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{name}: cannot load the configuration ({reason})") from error
    return TracedModel(traced, tokenizer, name, remote=True, blocks=blocks)


def run_through(envoys: Sequence[Any], moves: Moves, wanted: Sequence[int]) -> list[Tensor]:
    """Inside a trace: edit the stream layer by layer, in order, and return it after the wanted ones."""
    kept = []
    for layer in sorted({*moves, *wanted}):
        out = envoys[0].input if layer == EMBED else envoys[layer].output
        x = out[0] if isinstance(out, tuple) else out
        for index, fn in moves.get(layer, ()):
            here = (index[0].to(x.device), index[1].to(x.device))
            x = x.index_put(here, fn(x[here]).to(x))
        if layer in moves:
            if layer == EMBED:
                envoys[0].input = x
            else:
                envoys[layer].output = (x, *out[1:]) if isinstance(out, tuple) else x
        if layer in wanted:
            kept.append(x)
    return kept


def _passes(width: int, new_tokens: int, use_cache: bool, chunk: int | None) -> list[tuple[int, int]]:
    """First and last column (exclusive) of every forward pass of a generation; the last token is never fed back."""
    if not use_cache:
        return [(0, width + k) for k in range(new_tokens)]
    size = chunk or width
    prefill = [(a, min(a + size, width)) for a in range(0, width, size)]
    return prefill + [(width + k, width + k + 1) for k in range(new_tokens - 1)]


def _moves(batch: Batch, edits: Sequence[Edit], passes: Sequence[tuple[int, int]], new_tokens: int = 0) -> list[Moves]:
    """What every forward pass has to edit."""
    if any(e.when is not None for e in edits):
        raise UserError("a gate decides inside the forward pass, which nnsight plans beforehand; use backend='hf'")
    masks = {e.where: _columns(batch, e.where, new_tokens) for e in edits}
    out: list[Moves] = []
    for first, end in passes:
        moves: Moves = {}
        for e in edits:
            rows, columns = masks[e.where][:, first:end].nonzero(as_tuple=True)
            if len(rows):
                moves.setdefault(e.layer, []).append(((rows, columns), _checked(e)))
        out.append(moves)
    return out


def _columns(batch: Batch, where: Selection, new_tokens: int) -> Bool[Tensor, "row column"]:
    """Which columns of the padded batch, and of the tokens generated after it, a selection means."""
    width = batch.ids.shape[1]
    out = torch.zeros((len(batch.rows), width + new_tokens), dtype=torch.bool)
    for i, row in enumerate(batch.rows):
        first = width - len(row) if batch.side == "left" else 0
        out[i, first : first + len(row)] = torch.tensor(where.mask(row))
        said = len(row) - row.n_prompt  # of a response that is there already
        out[i, width:] = where.generated_mask(torch.arange(said, said + new_tokens))
    return out


def _checked(e: Edit) -> Callable[[Tensor], Tensor]:
    fn, layer = e.fn, e.layer

    def apply(old: Tensor) -> Tensor:
        new = fn(old)
        if new.shape != old.shape:
            raise UserError(f"edit at layer {layer}: fn returned shape {tuple(new.shape)}, not {tuple(old.shape)}")
        return new

    return apply
