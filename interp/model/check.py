"""What a forward pass of a few tokens says about the layout that was found, before anything is built on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pingscope.interp.errors import UserError
from pingscope.interp.model.contract import Model
from pingscope.interp.model.hooks import Handle, on_output
from pingscope.interp.model.selection import EMBED

# Relative to the largest value; sums of three terms in half precision round more than single modules.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

N_TOKENS = 8  # in each of the first pass's three rows: other than their number, so that axes can be told apart


def distance(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Largest difference relative to the largest value of ``b``, in float32."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def check_best(name: str, ids: Sequence[str], best: Float[Tensor, " row"]) -> None:
    """Refuse next-token logits that mean nothing, by the largest of every row; ``ids`` names the rows' prompts.

    Raises:
        UserError: names the first prompt whose largest logit is NaN or infinite.
    """
    sound = torch.isfinite(best)
    if not bool(sound.all()):
        refuse_numbers(name, ids[int((~sound).nonzero()[0])])


def refuse_numbers(name: str, prompt: str, where: str = "logits") -> NoReturn:
    """The one line for numbers that overflowed or come from damaged weights."""
    where_from = f"prompt {prompt!r}: " if prompt else ""
    raise UserError(
        f"{where_from}{name} gives {where} that are NaN or infinite; load it in float32, use a smaller dose or another "
        "checkpoint"
    )


class LogitsWatch:
    """Among the processors of a generation: changes nothing, and remembers which rows' logits meant nothing.

    At once where tokens are drawn (``drawing``), since no token can be drawn from such logits; otherwise at the end.
    """

    def __init__(self, name: str, ids: Sequence[str], drawing: bool) -> None:
        self.name, self.ids, self.drawing = name, ids, drawing
        self._worst: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.amax(-1)
        self._worst = best if self._worst is None else self._worst + best * 0  # NaN and infinity stay, as NaN
        if self.drawing:
            self.check()
        return scores

    def check(self) -> None:
        """Refuse what was seen, see :func:`check_best`; asks the device once."""
        if self._worst is not None:
            check_best(self.name, self.ids, self._worst)


@dataclass(frozen=True)
class Findings:
    """What the first forward pass of a model said.

    Attributes:
        parts_problem: why the parts of its blocks cannot be used; empty where embedding + attention + MLP outputs add
            up to the stream after every block.
        pads: whether tokens behind padding are read as without it; else batches hold prompts of one length.
        norm: path of the norm between the last block and the head, where one was found.
        first_state: layer that the model's own list of hidden states begins with; None where it gives none like them.
        idle: layers that text does not run through (a Llama 3.2 Vision model's cross-attention).
    """

    parts_problem: str
    pads: bool = True
    norm: str = ""
    first_state: int | None = None
    idle: frozenset[int] = frozenset()


@dataclass
class _Seen:
    """What the hooks saw in one pass."""

    stream: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)

    def keep(self, layer: int, x: Tensor) -> None:
        self.stream[layer] = x
        self.runs[layer] += 1


@torch.no_grad()
def check_forward(model: Model) -> Findings:
    """Run three rows of eight tokens and compare what the hooks see with what the model returns.

    The second row ends otherwise than the first, the third is the first behind padding.

    Raises:
        UserError: a block whose output is not (batch, pos, d_model), that runs more than once, or that does not run;
            a stream that reads ahead; or one that is not what the model itself returns as its hidden states.
    """
    seen, out, pads = _first_pass(model)
    kind, where, stream = type(model.hf).__name__, model.family.blocks, seen.stream
    idle = frozenset(range(model.n_layers)) - set(stream) if 0 in stream else frozenset()
    remedy = "pass the path of the decoder blocks as --blocks (blocks=…)"
    for layer in (EMBED, *range(model.n_layers)):
        if layer in idle:
            continue
        name = "the input of block 0" if layer == EMBED else f"block {layer}"
        x = stream.get(layer)
        if x is None or x.ndim != 3 or x.shape[1:] != (N_TOKENS, model.d_model):
            shown = "nothing" if x is None else tuple(x.shape)
            raise UserError(
                f"{kind}: {name} at {where} put out {shown} for {N_TOKENS} tokens, "
                f"not (…, {N_TOKENS}, {model.d_model}); {remedy}"
            )
        if seen.runs[layer] > 1:
            raise UserError(f"{kind}: {name} at {where} ran {seen.runs[layer]} times for one token; {remedy}")
        if not bool(torch.isfinite(x[:2]).all()):
            raise UserError(
                f"{model.name}: a few tokens give NaN or infinite activations after layer {layer}; the checkpoint is "
                "damaged, or overflows in this dtype: load it in float32"
            )
    last = out.last_hidden_state
    tolerance = TOLERANCE.get(last.dtype, 5e-2)
    if (error := max(distance(x[1, :-1], x[0, :-1]) for x in stream.values())) > tolerance:
        raise UserError(
            f"{kind}: what it computes at a token depends on later tokens (off by {error:.1e}), so it is no decoder; "
            "a BERT-like model needs is_decoder: true in its config.json"
        )
    if model.family.name == "custom" and model.takes_positions and _counts_otherwise(model, seen):
        raise UserError(  # RoBERTa: from its padding token's id on
            f"{kind}: its forward pass does not count positions from 0, as generation in transformers does, so what "
            "is read would not be what answers; use another model"
        )
    first = _first_state(model, stream, getattr(out, "hidden_states", None), tolerance)
    norm = _check_norm(model, stream[max(stream)], last, tolerance)
    if model.family.name == "custom" and norm is None and first is None:
        raise UserError(
            f"{kind}: the blocks at {where} put out neither its hidden states nor, normed, its last one; {remedy}"
        )
    behind = pads and max(distance(x[2, 1:], x[0, :-1]) for x in stream.values()) <= tolerance
    if model.family.name == "custom":
        behind = behind and not _continuation_problem(model, tolerance, padded=True)  # GIT: read, but not continued
        if not behind and (problem := _continuation_problem(model, tolerance, padded=False)):
            raise UserError(f"{kind}: {problem}, so it could be read but not answer; use another model")
    return Findings(_check_sums(model, seen, tolerance), behind, norm or "", first, idle)


def _first_pass(model: Model) -> tuple[_Seen, Any, bool]:
    """What hooks saw, what the model returned, and whether padding runs at all."""
    failures = []
    for pads in (True, True, False):
        try:
            return *_run(model, pads), pads
        except _StreamsFound:
            continue
        except UserError:
            raise
        except Exception as broken:  # noqa: BLE001 - a foreign architecture fails in any way
            failures.append(broken)
    reason = " ".join(str(failures[-1]).split())[:160]
    raise UserError(
        f"{type(model.hf).__name__}: a few tokens do not run through it ({type(failures[-1]).__name__}: {reason}); "
        "pass the path of the decoder blocks as --blocks (blocks=…), or check its config.json"
    ) from failures[-1]


def _some_ids(model: Model) -> list[int]:
    """One token more than a row of a trial holds, spread over the vocabulary."""
    return [model.vocab_size * (k + 1) // (N_TOKENS + 2) for k in range(N_TOKENS + 1)]


def _run(model: Model, pads: bool) -> tuple[_Seen, Any]:
    *text, other = _some_ids(model)
    rows = [text, [*text[:-1], other], [model.pad_id, *text[:-1]]]
    ids = torch.tensor(rows[: 3 if pads else 2], device=model.device)
    mask = torch.ones_like(ids)
    mask[2:, 0] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.takes_positions:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    seen, handles = _Seen(), list[Handle]()
    try:
        handles.append(model.blocks[0].register_forward_pre_hook(partial(_find_streams, model), with_kwargs=True))
        for layer in range(EMBED, model.n_layers):
            handles.append(model.on_residual(layer, partial(seen.keep, layer)))
        for layer, found in enumerate(model.parts):
            for name in ("attn_out", "mlp_out"):
                if found is not None:
                    handles.append(on_output(found[name], partial(seen.parts.__setitem__, (layer, name))))
        with model.evaluating():
            # Asking for hidden states leaves hooks of transformers' own on the model: done where it is to prove a find.
            asked = {"output_hidden_states": True} if model.family.name == "custom" else {}
            return seen, model.base(**given, **asked)
    finally:
        for handle in handles:
            handle.remove()


def _counts_otherwise(model: Model, seen: _Seen) -> bool:
    """Whether positions from 0, as they are passed in, are others than those that the model would take."""
    model.takes_positions = False
    try:
        alone = _run(model, pads=False)[0].stream
    finally:
        model.takes_positions = True
    tolerance = TOLERANCE.get(alone[EMBED].dtype, 5e-2)
    return any(distance(alone[layer][:2], x[:2]) > tolerance for layer, x in seen.stream.items())


def _continuation_problem(model: Model, tolerance: float, padded: bool) -> str:
    """What is wrong with the second of two generated tokens, from what the model remembers of the text; or empty.

    Args:
        padded: beside a row behind padding.
    """
    from transformers import GenerationConfig

    *text, _ = _some_ids(model)
    ids = torch.tensor([text, [model.pad_id, *text[:-1]]][: 2 if padded else 1], device=model.device)
    mask = torch.ones_like(ids)
    mask[1:, 0] = 0
    second = []
    for cached in (True, False):
        settings = GenerationConfig(
            max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=cached, pad_token_id=model.pad_id,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        try:
            with model.evaluating():
                said = model.hf.generate(ids, attention_mask=mask, generation_config=settings)
        except Exception as broken:  # noqa: BLE001 - a foreign architecture fails in any way
            reason = " ".join(str(broken).split())[:160]
            return f"generation in transformers fails ({type(broken).__name__}: {reason})"
        second.append(said.logits[1])
    error = distance(*second)
    return "" if error <= tolerance else f"from its cache it predicts otherwise than anew (off by {error:.1e})"


class _StreamsFound(Exception):
    """The hooks of this pass took several streams for one; run it again."""


def _find_streams(model: Model, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Several residual streams beside each other: how many, and which axis of what a block takes in counts them."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or model.n_streams > 1:
        return
    if x.ndim == 4:
        model.stream_axis = 2 if x.shape[1] == N_TOKENS else 0  # hyper-connections, or AltUp
        model.n_streams = x.shape[model.stream_axis]
    elif x.ndim == 3 and x.shape[-1] % model.d_model == 0:
        model.n_streams = x.shape[-1] // model.d_model
    if model.n_streams > 1:
        model.d_model *= model.n_streams
        raise _StreamsFound


def _first_state(model: Model, stream: dict[int, Tensor], states: Any, tolerance: float) -> int | None:
    """The layer that the model's own hidden states begin with: before block 0 (most), or after it (Mamba).

    Known of families in the table, measured of others.

    Raises:
        UserError: it gives as many as it has blocks, and they are others.
    """
    if model.family.name != "custom":
        return EMBED
    if not isinstance(states, tuple | list) or len(states) not in (model.n_layers, model.n_layers + 1):
        return None
    wanted = list(map(model.beside, states))
    errors = {}
    for first in (EMBED, 0):
        pairs = [(stream[layer], x) for layer, x in enumerate(wanted, first) if layer in stream][: model.n_layers - 1]
        if any(a.shape != b.shape for a, b in pairs):
            return None
        errors[first] = max((distance(a[:2], b[:2]) for a, b in pairs), default=0.0)
    best = min(errors, key=lambda one: errors[one])
    if errors[best] <= tolerance:
        return best
    raise UserError(
        f"{type(model.hf).__name__}: what the blocks at {model.family.blocks} put out differs from the model's own "
        f"hidden states by {errors[best]:.1e}; pass the path of the decoder blocks as --blocks (blocks=…)"
    )


def _check_norm(model: Model, end: Tensor, last: Tensor, tolerance: float) -> str | None:
    """The norm that makes the last hidden state of the last block's output: the family's, or one found by trying.

    Empty where there is none, because the two are equal; None where they are not, and no norm makes them so.
    """
    if model.n_streams > 1 or last.shape != end.shape:
        return None
    known = model.final_norm
    if known is not None:
        error = distance(known(end.to(next(known.parameters(), last).device))[:2], last[:2])
        if error > tolerance:
            raise UserError(
                f"{type(model.hf).__name__}: the final norm at {model.family.norm} of the last block's output differs "
                f"from the last hidden state by {error:.1e}; pass the path of the decoder blocks as --blocks (blocks=…)"
            )
        return model.family.norm
    if distance(end[:2], last[:2]) <= tolerance:
        return ""
    within = f"{model.family.blocks}."
    for name, module in model.hf.named_modules():
        gain = getattr(module, "weight", None)
        if not isinstance(gain, Tensor) or gain.shape != end.shape[-1:] or name.startswith(within):
            continue
        if distance(module(end.to(gain.device))[:2], last[:2]) <= tolerance:
            return name
    return None


def _check_sums(model: Model, seen: _Seen, tolerance: float) -> str:
    if model.n_streams > 1:
        return "several residual streams, which its blocks mix"
    stream, parts = seen.stream, seen.parts
    for layer in range(model.n_layers):
        if layer not in stream:
            return f"text does not run through block {layer}"
        if model.parts[layer] is None:
            names = ", ".join(name for name, _ in model.blocks[layer].named_children())
            return f"no known attention and MLP in block {layer} ({type(model.blocks[layer]).__name__}: {names})"
        if any((layer, name) not in parts for name in ("attn_out", "mlp_out")):
            return f"the attention or MLP found in block {layer} did not run"
        before, after = stream[layer - 1].float().cpu(), stream[layer]
        added = sum(parts[layer, name].float().cpu().reshape(before.shape) for name in ("attn_out", "mlp_out"))
        if (error := distance(before + added, after)) > tolerance:
            return f"attention and MLP outputs of block {layer} do not add up to its output (off by {error:.1e})"
    return ""
