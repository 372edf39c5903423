"""The tokens of a handful of prompts with their safety logits, as data that the page's script paints."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from pingscope.figures import theme
from pingscope.figures.numbers import sort_layers
from pingscope.schema import TokenRow


def payload(rows: Sequence[TokenRow]) -> dict[str, Any] | None:
    """Prompts by arm with logits as base64 float32, and for each layer the logit at which the colour is full.

    Args:
        rows: one prompt under one arm each, columns of equal length.
    """
    if not rows:
        return None
    prompts: dict[str, dict[str, Any]] = {}
    spread: dict[str, list[np.ndarray]] = {}
    for row in rows:
        name = str(row.id)
        prompt = prompts.setdefault(name, {"id": name, "label": row.label, "title": _title(row), "arms": {}})
        logits = {layer: _array(column) for layer, column in row.logits.items()}
        for layer, column in logits.items():
            spread.setdefault(layer, []).append(np.abs(column[~np.isnan(column)]))
        prompt["arms"][row.arm] = {
            "tokens": row.tokens,
            "roles": row.roles,
            "logits": {layer: base64.b64encode(column.tobytes()).decode() for layer, column in logits.items()},
        }
    layers = sort_layers(spread)
    # The 95th percentile, not the maximum: markup tokens can lie far off and would turn everything else pale.
    scale = {
        l: float(f"{np.percentile(np.concatenate(spread[l]), 95):.3g}") for l in layers if sum(map(len, spread[l]))
    }
    arms = theme.sort_arms(list(dict.fromkeys(row.arm for row in rows)))
    return {"prompts": list(prompts.values()), "layers": layers, "arms": arms, "scale": scale}


def _array(column: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column], dtype="<f4")


def _title(row: TokenRow) -> str:
    """What the reader picks the prompt by: its title, else the words of its instruction."""
    if row.title:
        return row.title
    words = "".join(t for t, r in zip(row.tokens, row.roles, strict=True) if r == "instruction")
    words = " ".join(words.split()) or str(row.id)
    return words if len(words) <= 90 else words[:89].rstrip() + "…"
