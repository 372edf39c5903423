"""Whether the weights of a loaded model are those of its files: none made up, none left over, none without meaning."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from torch import nn

from pingscope.interp.errors import UserError

NAMED = 3  # tensors that a message spells out

# Buffers that older versions of the libraries saved; each model makes them anew.
HARMLESS = re.compile(
    r"(^|\.)(attn|attention|self_attention)\.(masked_bias|bias)$|rotary_emb\.\w+$|(^|\.)(position_ids|token_type_ids)$"
    r"|(^|\.)(embed_positions\.weights|embed_positions\._float_tensor|masked_bias)$"
)
# Where zero is a start or a setting like any other: offsets, LoRA's second matrix, a router that has not learnt yet.
MAY_BE_ZERO = re.compile(r"bias\w*$|lora_|router|\.gate\.weight$")


def load_checked(auto: Any, source: str, name: str, **options: Any) -> Any:
    """``auto.from_pretrained(source, …)``, refused unless every weight comes from the file.

    Args:
        auto: a class of ``transformers`` such as ``AutoModelForCausalLM``.
        name: how messages call the model.

    Raises:
        UserError: names the tensors that are missing, unexpected, of another shape, not finite or all zero.
    """
    with _quiet(), _without_bar(bool(options.get("gguf_file"))):
        try:
            hf, info = auto.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        except Exception as error:  # a foreign file makes the library fail in any way
            raise UserError(f"{name}: cannot load the model ({in_short(error)})") from error
    check_loading(name, info)
    check_values(name, hf)
    return hf


def check_loading(name: str, info: Mapping[str, Any]) -> None:
    """Compare files and model by what ``transformers`` says of loading it.

    Tied weights, buffers that are not saved, and tensors that the model class itself names as superfluous (a vision
    tower, layers for multi-token prediction) are not in ``info``.
    """
    if shapes := sorted(info["mismatched_keys"]):
        tensor, there, here = shapes[0]
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        raise UserError(
            f"{name}: {tensor}{more} has shape {tuple(there)} in the file, but {tuple(here)} by config.json; "
            "put back the config.json of these weights"
        )
    if missing := info["missing_keys"]:
        raise UserError(
            f"{name}: the file lacks {_listed(missing)}, which would be filled at random; "
            "use a complete checkpoint, and the config.json of these weights"
        )
    if unexpected := [key for key in info["unexpected_keys"] if not HARMLESS.search(key)]:
        raise UserError(
            f"{name}: the file holds {_listed(unexpected)}, which the model of its config.json has no place for; "
            "put back the config.json of these weights, or leave those tensors out"
        )


@torch.no_grad()
def check_values(name: str, hf: nn.Module) -> None:
    """Refuse weights that are not finite, and matrices of zeros; one pass over each tensor, wherever it is.

    A bias, a norm's offset and what :data:`MAY_BE_ZERO` names may be zero. What is not in memory (offloaded) or stored
    in 8 bits and less cannot be read so and is left out.
    """
    for key, tensor in hf.named_parameters():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
            continue
        least, most = (float(value) for value in torch.aminmax(tensor))
        if not torch.isfinite(torch.tensor([least, most])).all():
            raise UserError(f"{name}: {key} holds NaN or infinity; the checkpoint is damaged, use another one")
        if least == most == 0 and tensor.ndim > 1 and not MAY_BE_ZERO.search(key):
            raise UserError(f"{name}: {key} is all zero; the checkpoint is damaged or unfinished, use another one")


def in_short(error: BaseException, most: int = 240) -> str:
    """An exception on one line."""
    return " ".join(f"{error}".split())[:most] or type(error).__name__


def _listed(keys: Iterable[str]) -> str:
    names = sorted(keys, key=lambda key: ([int(part) for part in key.split(".") if part.isdigit()], key))
    more = f" and {len(names) - NAMED} more tensors" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _without_bar(dequantises: bool) -> AbstractContextManager[Any]:
    """Undoing a GGUF's quantisation draws a bar that no setting turns off; downloads keep theirs."""
    return redirect_stderr(io.StringIO()) if dequantises else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the table of missing and unexpected tensors: what it says is refused in one line."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
