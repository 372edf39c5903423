"""A PEFT adapter on its base: merged, so that every part that is read or edited is an ordinary module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pingscope.interp.checkpoint import tensor_names
from pingscope.interp.errors import UserError
from pingscope.interp.model.weights import check_values, in_short

WEIGHTS = "adapter_model.safetensors"


def with_adapter(hf: Any, folder: Path, name: str) -> Any:
    """``hf`` with the adapter of ``folder`` merged into it.

    Raises:
        UserError: an adapter that does not fit, is not whole, cannot be merged, or holds values that are not finite.
    """
    from peft import PeftModel, get_peft_model_state_dict

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


def _embeddings(held: set[str]) -> set[str]:
    """Embeddings that were saved whole beside the adapter."""
    return {key for key in held if key.endswith(("embed_tokens.weight", "lm_head.weight"))}
