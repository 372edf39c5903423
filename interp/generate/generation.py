"""Batched generation with edits at absolute positions, and the first token's distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pingscope.interp.chat.batching import Batch, token_budget_batches
from pingscope.interp.chat.beginnings import first_tokens, where_answers_differ
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.chat.template import ends_of_turns
from pingscope.interp.errors import UserError
from pingscope.interp.generate.embedded import with_placeholders
from pingscope.interp.generate.forced import Given, decode, edits_prompt_alone
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import TOKEN_BUDGET, HookedModel
from pingscope.interp.model.hooks import Condition, Edit, Watch, check_edits, live_edits


@dataclass(frozen=True)
class Generation:
    """What the model said after one prompt: never the prompt, the injected prefix, or the end token.

    ``finished`` tells an answer that ended from one cut off at the token limit.
    """

    id: str
    text: str
    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class GatedPrefix:
    """Tokens put before the answer of those rows on which ``when`` is open at the end of the prompt."""

    when: Condition
    ids: tuple[int, ...]


def generate(
    model: HookedModel,
    rows: Sequence[Rendered],
    *,
    max_new_tokens: int = 64,
    edits: Sequence[Edit] = (),
    temperature: float = 0.0,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
    prompts: PromptCache | None = None,
    prefix: GatedPrefix | None = None,
    said: Sequence[tuple[int, ...]] | None = None,
    soft: Float[Tensor, "k d_model"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue every row, in the order given; greedy unless ``temperature`` is positive.

    Penalties and filters of the checkpoint's own generation settings are left out: the output is the model's
    distribution and the edits, nothing else. Its end tokens are kept. Greedy answers do not depend on the batch;
    sampled ones are repeatable for the same rows, budget and seed.

    Args:
        token_budget: most slots (prompts x (longest + new tokens)) in one batch.
        use_cache: keep keys and values; without, every new token runs the whole text again.
        prefill_chunk: read prompts in pieces of so many tokens, which bounds the memory of long ones.
        prompts: keeps what was read of these prompts for the next call, where arms share them.
        prefix: decided on in the pass that reads the prompt; an edit counts its tokens as generated ones.
        said: of every row the tokens it is to say, instead of its own; the passes are those of an answer of its own.
        soft: embeddings that stand behind every prompt, as a prefix of the answer that is no text.
        progress: called with the number of prompts just finished.

    Raises:
        UserError: a prompt longer than the context, an edit that can match nothing.
    """
    if soft is not None:
        rows = [with_placeholders(row, len(soft), model.pad_id) for row in rows]
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is not positive; give at least 1")
    model.check_context(rows, new_tokens=max_new_tokens)
    # The last new token is never fed back, so no edit can reach it.
    check_edits(model, edits, rows, new_tokens=max_new_tokens - 1)
    ends = end_ids(model)
    stepwise = temperature == 0 and use_cache and prefill_chunk is None
    if (prefix or said or soft is not None) and not stepwise:
        raise UserError(
            "generate: a gated or soft prefix or given answers need greedy decoding with a cache, without chunks"
        )
    if prefix is not None and bool(prefix.when.where.generated_mask(torch.arange(max_new_tokens)).any()):
        raise UserError(
            f"generate: the prefix's gate reads '{prefix.when.where}'; it has to decide on the prompt alone"
        )
    by_step = prefix or said is not None or soft is not None or any(e.when is not None for e in edits)
    stepwise = stepwise and bool(by_step)
    settings = _settings(model, max_new_tokens, temperature, ends, use_cache, prefill_chunk)
    out: list[Generation | None] = [None] * len(rows)
    lengths = [len(r) + max_new_tokens for r in rows]
    for number, order in enumerate(token_budget_batches(lengths, token_budget, padded=model.pads)):
        batch = model.batch([rows[i] for i in order], side="left")
        live = live_edits(edits, batch.rows, max_new_tokens - 1)
        past = prompts.past(batch.rows, live) if prompts and use_cache and not (prefill_chunk or stepwise) else None
        if stepwise or (past is not None and temperature == 0 and edits_prompt_alone(live, max_new_tokens)):
            spoken = decode(
                model, batch, _starts(order, prefix, said), max_new_tokens, ends, live,
                (prefix.when,) if prefix else (), soft, past,
            )  # fmt: skip
        else:
            spoken = _continued(model, batch, settings, live, past, seed + number)
        for i, new in zip(order, spoken, strict=True):
            out[i] = _spoken(model, rows[i].id, new, ends)
        if progress is not None:
            progress(len(order))
    return [g for g in out if g is not None]


def _continued(
    model: HookedModel, batch: Batch, settings: Any, live: Sequence[Edit], past: Any, seed: int
) -> list[list[int]]:
    """By transformers' own generation; what is drawn depends on ``seed`` and leaves the caller's draws as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return list(model.continuations(batch, settings, live, past).tolist())


def _spoken(model: HookedModel, name: str, new: Sequence[int], ends: Sequence[int]) -> Generation:
    """New tokens up to the first that ends the answer, as text."""
    end = next((k for k, token in enumerate(new) if token in ends), None)
    ids = tuple(new[:end])
    text = model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generation(name, text, ids, end is not None)


def first_token_distribution(
    model: HookedModel,
    rows: Sequence[Rendered],
    starts: Mapping[str, Sequence[str]],
    edits: Sequence[Edit] = (),
) -> dict[str, Float[Tensor, " row"]]:
    """Probability, per row, that the next token is the first token of one of each group's texts.

    ``starts`` maps a group (``refusal``, ``action``, ``comment``) to beginnings of answers ("I cannot"), read behind
    the header that they follow, and the white space that the template puts before every answer. A token that begins
    texts of several groups counts in each.
    """
    rows = where_answers_differ(model, rows, [text for texts in starts.values() for text in texts])
    probabilities = model.next_token_logits(rows, edits).softmax(-1)
    out = {}
    for group, texts in starts.items():
        ids = sorted({token for text in texts for token in first_tokens(model, text)})
        if not ids:
            raise UserError(f"first-token group {group!r} has no text; give at least one beginning")
        out[group] = probabilities[:, ids].sum(-1)
    return out


def end_ids(model: HookedModel) -> list[int]:
    """Tokens that end an answer: of the checkpoint's generation settings, the tokenizer's end of text, and those that
    its chat template ends a turn with, or a tool call, which many checkpoints leave out of their settings.
    """
    ends = model.hf.generation_config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    own = getattr(model.tokenizer, "eos_token_id", None)
    return list(dict.fromkeys([*known, *([] if own is None else [own]), *ends_of_turns(model.tokenizer)]))


def _starts(order: Sequence[int], prefix: GatedPrefix | None, said: Sequence[tuple[int, ...]] | None) -> Given:
    """The tokens that each row of a batch starts with, once its prompt has been read."""

    def given(watches: Sequence[Watch]) -> list[tuple[int, ...]]:
        starts = [() if said is None else said[i] for i in order]
        if prefix is None:
            return starts
        opened = watches[0].opened.tolist()
        return [prefix.ids + start if flag else start for flag, start in zip(opened, starts, strict=True)]

    return given


def _settings(
    model: HookedModel,
    max_new_tokens: int,
    temperature: float,
    ends: list[int],
    use_cache: bool,
    prefill_chunk: int | None,
) -> Any:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=model.pad_id,
        use_cache=use_cache,
        prefill_chunk_size=prefill_chunk,
        **({"do_sample": False} | sampling),
    )
