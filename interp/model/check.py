"""What a forward pass of two tokens says about the layout that was found, before anything is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.errors import UserError
from pingscope.interp.model.contract import Model
from pingscope.interp.model.hooks import on_output
from pingscope.interp.model.selection import EMBED

# Relative to the largest value; sums of three terms in half precision round more than single modules.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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


@torch.no_grad()
def check_forward(model: Model) -> str:
    """Run two tokens through the model and compare what the hooks see with what it returns.

    Returns:
        Why the parts of its blocks cannot be used; empty where embedding + attention + MLP outputs add up to the
        stream after every block.

    Raises:
        UserError: a block whose output is not (batch, pos, d_model), one that does not run, or a last block whose
            normed output is not the final hidden state.
    """
    stream: dict[int, Tensor] = {}
    parts: dict[tuple[int, str], Tensor] = {}
    device, vocab = model.device, model.vocab_size
    ids = torch.tensor([[vocab // 3, vocab // 2]], device=device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.takes_positions:
        given["position_ids"] = torch.arange(2, device=device)[None]
    handles = []
    try:
        for layer in range(EMBED, model.n_layers):
            handles.append(model.on_residual(layer, partial(stream.__setitem__, layer)))
        for layer, found in enumerate(model.parts):
            for name in ("attn_out", "mlp_out"):
                if found is not None:
                    handles.append(on_output(found[name], partial(parts.__setitem__, (layer, name))))
        with model.evaluating():
            last = model.base(**given).last_hidden_state
    except UserError:
        raise
    except Exception as broken:  # a foreign architecture fails in any way
        reason = " ".join(str(broken).split())[:160]
        raise UserError(
            f"{type(model.hf).__name__}: two tokens do not run through it ({type(broken).__name__}: {reason}); "
            "pass the path of the decoder blocks as --blocks (blocks=…), or check its config.json"
        ) from broken
    finally:
        for handle in handles:
            handle.remove()
    kind, where = type(model.hf).__name__, model.family.blocks
    for layer in (EMBED, *range(model.n_layers)):
        if layer not in stream or stream[layer].shape != (1, 2, model.d_model):
            seen = tuple(stream[layer].shape) if layer in stream else "nothing"
            name = "the input of block 0" if layer == EMBED else f"block {layer}"
            raise UserError(
                f"{kind}: {name} at {where} put out {seen} for 2 tokens, not (1, 2, {model.d_model}); "
                "pass the path of the decoder blocks as --blocks (blocks=…)"
            )
        if not bool(torch.isfinite(stream[layer]).all()):
            raise UserError(
                f"{model.name}: two tokens give NaN or infinite activations after layer {layer}; the checkpoint is "
                "damaged, or overflows in this dtype: load it in float32"
            )
    tolerance = TOLERANCE.get(last.dtype, 5e-2)
    norm = model.final_norm
    if norm is not None and last.shape[-1] == model.d_model:
        after = norm(stream[model.n_layers - 1].to(next(norm.parameters(), last).device))
        error = distance(after, last)
        if error > tolerance:
            raise UserError(
                f"{kind}: the final norm at {model.family.norm} of the last block's output differs from the last "
                f"hidden state by {error:.1e}; pass the path of the decoder blocks as --blocks (blocks=…)"
            )
    return _check_sums(model, stream, parts, tolerance)


def _check_sums(model: Model, stream: dict[int, Tensor], parts: dict[tuple[int, str], Tensor], tolerance: float) -> str:
    for layer in range(model.n_layers):
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
