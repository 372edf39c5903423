"""From token activations to one vector a prompt.

``mean_prompt``       mean over every token before the model's turn, chat markup and beginning-of-text
                      included: the paper averages over the prompt's tokens, and probes see what the model
                      sees. An injected prefix is the start of the response, so it does not count.
``mean_instruction``  mean over the tokens of the task's own words.
``final``             the last token before the model speaks: the last header token, or the last prefix token.
``mean:SELECTION``    mean over any selection of :mod:`pingscope.interp.model.selection`, such as ``mean:role:header``;
``max:SELECTION``     the largest value of each coordinate over it.

A probe is linear, so its logit on a mean is the mean of its logits over the tokens: pooled features are all
that the readings of a collapse need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.errors import UserError
from pingscope.interp.model.selection import parse
from pingscope.interp.store.activations import ActivationStore

POOLINGS = ("mean_prompt", "mean_instruction", "final")

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Pooled:
    """One vector a prompt and layer, float64; a prompt without such tokens (``counts`` 0) is a row of NaN."""

    features: dict[int, Float[np.ndarray, "prompt d_model"]]
    prompt_ids: list[str]
    labels: list[str]
    counts: Int[np.ndarray, " prompt"]  # tokens averaged

    @property
    def present(self) -> np.ndarray:
        return self.counts > 0

    def take(self, rows: np.ndarray) -> Pooled:
        """The prompts chosen by a boolean mask or an array of row numbers, in that order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Pooled(
            {layer: values[rows] for layer, values in self.features.items()},
            [self.prompt_ids[i] for i in rows],
            [self.labels[i] for i in rows],
            self.counts[rows],
        )


@dataclass(frozen=True)
class Tokens:
    """A store's index as arrays over its rows; prompts are numbered by first appearance."""

    prompt: np.ndarray  # row -> prompt number
    role: np.ndarray
    position: np.ndarray
    prompt_ids: list[str]
    labels: list[str]

    def chosen(self, pooling: str) -> np.ndarray:
        """Mask of the rows that ``pooling`` averages."""
        kind, named, where = pooling.partition(":")
        if named and kind in ("mean", "max"):
            return self._selected(where)
        if pooling == "mean_prompt":
            return ~np.isin(self.role, ("prefix", "response"))
        if pooling == "mean_instruction":
            return self.role == "instruction"
        if pooling != "final":
            raise UserError(
                f"pooling: unknown {pooling!r}; use one of {', '.join(POOLINGS)}, or mean: or max: and a selection"
            )
        before = np.flatnonzero(self.role != "response")
        last = np.full(len(self.prompt_ids), -1)
        np.maximum.at(last, self.prompt[before], self.position[before])
        mask = np.zeros(len(self.role), bool)
        mask[before] = self.position[before] == last[self.prompt[before]]
        return mask

    def _selected(self, where: str) -> np.ndarray:
        """The selection language over rows; positions that the store left out are simply not there."""
        selection = parse(where)
        mask = np.zeros(len(self.role), bool)
        order = np.lexsort((self.position, self.prompt))
        for rows in np.split(order, np.flatnonzero(np.diff(self.prompt[order])) + 1):
            length = int(self.position[rows[-1]]) + 1
            roles = ["template"] * length
            for row in rows:
                roles[self.position[row]] = str(self.role[row])
            whole = Rendered("", "", tuple([0] * length), tuple(roles))
            mask[rows] = np.array(selection.mask(whole))[self.position[rows]]
        return mask


def read_tokens(index: pa.Table) -> Tokens:
    """The columns of a store's index that pooling and tracks need."""
    encoded = index.column("prompt_id").cast(pa.string()).combine_chunks().dictionary_encode()
    prompt = encoded.indices.to_numpy(zero_copy_only=False)
    labels = index.column("label").cast(pa.string()).to_numpy()
    first = np.full(len(encoded.dictionary), len(prompt))
    np.minimum.at(first, prompt, np.arange(len(prompt)))
    return Tokens(
        prompt,
        index.column("role").cast(pa.string()).to_numpy().astype(str),
        index.column("position").to_numpy().astype(np.int64),
        encoded.dictionary.to_pylist(),
        [str(label) for label in labels[first]],
    )


def pool(store: ActivationStore, pooling: str, layers: Sequence[int] | None = None) -> Pooled:
    """Average (or ``max:``) a store's tokens prompt by prompt, in one streaming pass per layer; sums are float64.

    Raises:
        UserError: unknown pooling, or activations that are not finite (names layer and prompt).
    """
    tokens = read_tokens(store.index)
    rows = np.flatnonzero(tokens.chosen(pooling))
    counts = np.bincount(tokens.prompt[rows], minlength=len(tokens.prompt_ids))
    features = {}
    for layer in store.layers if layers is None else layers:
        total = None
        for chosen, values in blocks(store.layer(layer), rows):
            owner = tokens.prompt[chosen]
            if pooling.startswith("max:"):
                total = np.full((len(counts), values.shape[1]), -np.inf) if total is None else total
                np.maximum.at(total, owner, values)
                continue
            picks = csr_matrix(
                (np.ones(len(owner)), (owner, np.arange(len(owner)))), (len(tokens.prompt_ids), len(owner))
            )
            total = picks @ values if total is None else total + picks @ values
        if total is None:
            raise UserError(f"pooling: the store has no token for {pooling!r}; extract more positions")
        features[layer] = _finish(total, counts, pooling, layer, tokens.prompt_ids)
    return Pooled(features, tokens.prompt_ids, tokens.labels, counts)


def pool_rows(rows: Sequence[Rendered], residuals: Mapping[int, Sequence[torch.Tensor]], pooling: str) -> Pooled:
    """The same from residuals in memory, ``residuals[layer][i]`` (token, d_model) of ``rows[i]``."""
    tokens = Tokens(
        np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows]),
        np.concatenate([np.asarray(row.roles) for row in rows]),
        np.concatenate([np.arange(len(row.ids)) for row in rows]),
        [row.id for row in rows],
        [row.label for row in rows],
    )
    mask = tokens.chosen(pooling)
    counts = np.bincount(tokens.prompt[mask], minlength=len(rows))
    masks = np.split(mask, np.cumsum([len(row.ids) for row in rows])[:-1])
    features = {}
    for layer, states in residuals.items():
        reduce = np.max if pooling.startswith("max:") else np.sum
        start = -np.inf if reduce is np.max else 0.0
        joined = [
            reduce(state.double().cpu().numpy()[own], axis=0, initial=start)
            for state, own in zip(states, masks, strict=True)
        ]
        features[layer] = _finish(np.stack(joined), counts, pooling, layer, tokens.prompt_ids)
    return Pooled(features, tokens.prompt_ids, tokens.labels, counts)


def join(parts: Sequence[Pooled]) -> Pooled:
    """Prompts of several parts, one after another."""
    return Pooled(
        {layer: np.concatenate([part.features[layer] for part in parts]) for layer in parts[0].features},
        [name for part in parts for name in part.prompt_ids],
        [label for part in parts for label in part.labels],
        np.concatenate([part.counts for part in parts]),
    )


def blocks(states: torch.Tensor, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(row numbers, float64 values)`` of the chosen rows, a bounded piece of the mapped layer at a time."""
    size = max(1, _BLOCK_BYTES // (8 * states.shape[1]))
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        low, high = int(chosen[0]), int(chosen[-1]) + 1
        # A dense run is one sequential read; scattered rows (one final token a prompt) are picked singly.
        piece = states[low:high][chosen - low] if high - low <= 2 * len(chosen) else states[chosen]
        yield chosen, piece.double().numpy()


def _finish(total: np.ndarray, counts: np.ndarray, pooling: str, layer: int, prompt_ids: Sequence[str]) -> np.ndarray:
    broken = ~np.isfinite(total).all(1) & (counts > 0)
    if broken.any():
        raise UserError(
            f"activations of layer {layer} are not finite for prompt {prompt_ids[int(broken.argmax())]!r}; "
            "use a wider dtype (float32) or leave that prompt out"
        )
    means = np.full(total.shape, np.nan)
    divisor = np.minimum(counts, 1) if pooling.startswith("max:") else counts
    np.divide(total, divisor[:, None], out=means, where=counts[:, None] > 0)
    return means
