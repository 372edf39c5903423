"""A PEFT adapter on its base: merged, so that every part that is read or edited is an ordinary module."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pingscope.interp.checkpoint import tensor_names
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.interp.model.weights import check_values, in_short

WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"  # beside an adapter: whose weights it was trained on


def with_adapter(hf: Any, folder: Path, name: str, base: str) -> Any:
    """``hf``, read from ``base``, with the adapter of ``folder`` merged into it.

    Raises:
        UserError: an adapter that does not fit, is not whole, cannot be merged, holds values that are not finite, or
            says that it was trained on other weights (:func:`write_base`).
    """
    from peft import PeftModel, get_peft_model_state_dict

    _check_base(folder, base)
    held = tensor_names(folder / WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are refused below
            tuned = PeftModel.from_pretrained(hf, str(folder))
        wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    except Exception as error:
        raise UserError(f"{name}: the adapter does not fit this base ({in_short(error)}); pass its own base") from error
    if tuned.active_peft_config.is_prompt_learning:
        raise UserError(f"{name}: a {tuned.active_peft_config.peft_type.value} adapter adds no weights; use LoRA")
    lost, left = sorted(wanted - held), sorted(held - wanted - _embeddings(held))
    if lost or left:
        what = f"lacks {lost[0]}" if lost else f"holds {left[0]}, which this base has no place for"
        raise UserError(f"{folder / WEIGHTS}: {what} ({len(lost or left)} in all); pass the base it was trained on")
    check_values(name, tuned)
    try:
        merged = tuned.merge_and_unload()
    except Exception as error:
        raise UserError(f"{name}: the adapter cannot be merged ({in_short(error)}); merge it yourself") from error
    return merged.eval()


def write_base(folder: Path, base: Path) -> None:
    """Note beside an adapter which weights it belongs to: every model of that shape takes it, one gives its results."""
    write_json(folder / BASE, {"model": base.name, "weights": weights_digest(base)})


def weights_digest(folder: Path) -> str:
    """Hex SHA-256 of the tensors that a folder's safetensors hold, whatever their files and order."""
    parts = []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensor_names(file)):
                tensor = tensors.get_tensor(name)
                raw = tensor.reshape(-1).view(torch.uint8).numpy().data
                parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}")
    return sha256_of(sorted(parts))


def _check_base(folder: Path, base: str) -> None:
    """Compare the base's files with what :func:`write_base` noted; of a hub id, the files that were just loaded."""
    if not (folder / BASE).is_file():
        return
    place = Path(base)
    if not place.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(base, "config.json")
        if not isinstance(config, str):
            raise UserError(
                f"{folder}: belongs to certain weights ({BASE}), which {base} cannot be held to; pass a folder"
            )
        place = Path(config).parent
    noted = read_json(folder / BASE)
    if not isinstance(noted, dict) or noted.get("weights") != weights_digest(place):
        trained = noted.get("model", "another model") if isinstance(noted, dict) else "another model"
        raise UserError(
            f"{folder}: was trained on {trained} ({BASE}), and {base} holds other weights; pass that one as --base"
        )


def _embeddings(held: set[str]) -> set[str]:
    """Embeddings that were saved whole beside the adapter."""
    return {key for key in held if key.endswith(("embed_tokens.weight", "lm_head.weight"))}
