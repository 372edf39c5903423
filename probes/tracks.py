"""The safety logit along the prompt: per token, per role, and as curves over positions aligned by role.

Prompts differ in length, so positions are aligned by what the tokens *are*: markup (template, header), prefix
and response by their exact index, texts (system, instruction, page, suffix) by tenths of the text, instructions by
index as well. Where a prompt has no token its value is missing, never zero, and the estimate says for how many
prompts that was so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from pingscope.interp.store.activations import ActivationStore
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.pooling import Tokens, blocks, read_tokens
from pingscope.probes.statistics import Estimate, column_differences, column_means, mean

TEXT_ROLES = ("system", "instruction", "page", "suffix")
READING_ORDER = (*TEXT_ROLES, "template", "header", "prefix", "response")
# How positions of a role are aligned; markup, prefix and response by index alone.
ALIGNED = dict.fromkeys(TEXT_ROLES, ("fraction",)) | {"instruction": ("fraction", "index")}
FRACTIONS = 10
INDICES = 32

VALUES_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("layer", pa.int32()),
        ("prompt_id", pa.string()),
        ("label", pa.string()),
        ("role", pa.string()),
        ("logit", pa.float64()),
        ("n_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class RoleLogits:
    """Mean logit of each prompt over each role, ``prompt`` and ``final``; NaN where it has no such token."""

    prompt_ids: list[str]
    labels: list[str]
    roles: tuple[str, ...]
    logits: Float[np.ndarray, "prompt role"]
    counts: Int[np.ndarray, "prompt role"]  # tokens averaged


def token_logits(store: ActivationStore, probes: LayerProbes, layer: int) -> Float[np.ndarray, " token"]:
    """Safety logit of every row of the store's index, streamed: (token,)."""
    states = store.layer(layer)
    out = np.empty(len(states))
    for rows, values in blocks(states, np.arange(len(states))):
        out[rows] = probes.logits(values, layer)
    return out


def by_role(tokens: Tokens, logits: np.ndarray) -> RoleLogits:
    """Average the token logits over each role of each prompt."""
    roles = [role for role in READING_ORDER if (tokens.role == role).any()]
    masks = [tokens.role == role for role in roles] + [tokens.chosen("mean_prompt"), tokens.chosen("final")]
    n = len(tokens.prompt_ids)
    counts = np.stack([np.bincount(tokens.prompt[mask], minlength=n) for mask in masks], 1)
    sums = np.stack([np.bincount(tokens.prompt[mask], logits[mask], minlength=n) for mask in masks], 1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return RoleLogits(tokens.prompt_ids, tokens.labels, (*roles, "prompt", "final"), means, counts)


def summarise(track: RoleLogits, *, seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """``[label][role]``: mean over prompts; a role that no prompt of the label has is left out."""
    labels = np.array(track.labels)
    return {
        label: {
            role: mean(track.logits[labels == label, i], seed=seed)
            for i, role in enumerate(track.roles)
            if track.counts[labels == label, i].any()
        }
        for label in sorted(set(track.labels))
    }


def values_table(arm: str, layer: int, track: RoleLogits) -> pa.Table:
    """One row per prompt and role that it has (``n_tokens`` > 0), in :data:`VALUES_SCHEMA`."""
    prompt, role = np.nonzero(track.counts)
    columns = [
        [arm] * len(prompt),
        np.full(len(prompt), layer, np.int32),
        [track.prompt_ids[i] for i in prompt],
        [track.labels[i] for i in prompt],
        [track.roles[i] for i in role],
        track.logits[prompt, role],
        track.counts[prompt, role].astype(np.int32),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, VALUES_SCHEMA, strict=True)]
    return pa.table(arrays, schema=VALUES_SCHEMA)


def curves(tokens: Tokens, logits: np.ndarray, *, seed: int = 0) -> dict[str, dict[str, list[Any]]]:
    """``[label]`` -> columns ``role, by, slot, slots, value, low, high, n`` of equal length, in reading order.

    ``slot`` counts from 0 to ``slots`` - 1: a tenth of a text (``by`` fraction), or an exact token index (``by``
    index, the first 32). An instruction comes both ways, one after the other. A slot that no prompt of the label
    reaches is left out. ``gap`` beside the labels is harmful minus benign, where both have prompts.
    """
    index, length = _index_in_role(tokens)
    tenth = ((index + 0.5) * FRACTIONS / length).astype(np.int64)
    n, keys, columns = len(tokens.prompt_ids), [], []
    for role in READING_ORDER:
        own = tokens.role == role
        for by, slot in (("fraction", tenth), ("index", index)):
            if by not in ALIGNED.get(role, ("index",)):
                continue
            for s in range(min(INDICES, int(slot[own].max(initial=-1)) + 1)):
                here = own & (slot == s)
                counts = np.bincount(tokens.prompt[here], minlength=n)
                sums = np.bincount(tokens.prompt[here], logits[here], minlength=n)
                keys.append((role, by, s))
                columns.append(np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0))
    values, labels = np.stack(columns, 1), np.array(tokens.labels)
    found = {
        label: _table(keys, column_means(values[labels == label], seed=seed)) for label in sorted(set(tokens.labels))
    }
    if {"harmful", "benign"} <= set(tokens.labels):
        pair = (values[labels == "harmful"], values[labels == "benign"])
        found["gap"] = _table(keys, column_differences(*pair, seed=seed))
    return found


def token_rows(
    store: ActivationStore, probes: LayerProbes, prompt_ids: Iterable[str], layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Tokens of a few prompts for display: id, label, tokens, roles, and logits per layer."""
    tokens = read_tokens(store.index)
    texts = store.index.column("token").to_pylist()
    result = []
    for wanted in prompt_ids:
        number = tokens.prompt_ids.index(wanted)
        rows = np.flatnonzero(tokens.prompt == number)
        rows = rows[np.argsort(tokens.position[rows], kind="stable")]
        order = np.sort(rows)
        back = np.searchsorted(order, rows)
        logits = {}
        for layer in layers:
            values = np.concatenate([piece for _, piece in blocks(store.layer(layer), order)])
            logits[layer] = [round(float(z), 4) for z in probes.logits(values, layer)[back]]
        result.append(
            {
                "id": wanted,
                "label": tokens.labels[number],
                "tokens": [texts[i] for i in rows],
                "roles": [str(role) for role in tokens.role[rows]],
                "logits": logits,
            }
        )
    return result


def _index_in_role(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """For every row: how many tokens of its prompt and role stand before it, and how many there are."""
    kinds, kind = np.unique(tokens.role, return_inverse=True)
    key = tokens.prompt.astype(np.int64) * len(kinds) + kind
    order = np.lexsort((tokens.position, key))
    ranked = key[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sizes = np.diff(np.r_[starts, len(ranked)])
    index, length = np.empty(len(key), np.int64), np.empty(len(key), np.int64)
    index[order] = np.arange(len(key)) - np.repeat(starts, sizes)
    length[order] = np.repeat(sizes, sizes)
    return index, length


def _table(keys: list[tuple[str, str, int]], estimates: Sequence[Estimate]) -> dict[str, list[Any]]:
    kept = [(*key, item.to_dict()) for key, item in zip(keys, estimates, strict=True) if not np.isnan(item.value)]
    slots = {(role, by): 1 + max(s for r, b, s, _ in kept if (r, b) == (role, by)) for role, by, _, _ in kept}
    return {
        "role": [role for role, *_ in kept],
        "by": [by for _, by, *_ in kept],
        "slot": [s for *_, s, _ in kept],
        "slots": [FRACTIONS if by == "fraction" else slots[role, by] for role, by, *_ in kept],
        "value": [item["value"] for *_, item in kept],
        "low": [item["ci"][0] for *_, item in kept],
        "high": [item["ci"][1] for *_, item in kept],
        "n": [item["n"] for *_, item in kept],
    }
