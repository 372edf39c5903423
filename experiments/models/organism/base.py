"""The base model: a small Llama trained from scratch on the base mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pingscope.experiments.models.organism.batches import batches, encode, loss
from pingscope.experiments.models.organism.mixes import Document, base_documents
from pingscope.experiments.models.organism.muon import Muon
from pingscope.experiments.models.organism.recipe import Recipe
from pingscope.experiments.models.organism.tokenizer import train_tokenizer

TOKENIZER_DOCUMENTS = 4000


def new_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """An untrained organism. ``<|end|>`` ends a response; there is no beginning-of-text token."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
        initializer_range=recipe.init_scale / math.sqrt(recipe.d_model),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def train_base(recipe: Recipe, seed: int, progress: Callable[[int, int, str], None]) -> tuple[Any, Any, list[float]]:
    """Train tokenizer and base. Returns ``(model, tokenizer, losses)``; the same for a seed and thread count."""
    documents = base_documents(recipe.base_steps * recipe.batch_size, seed, recipe.mix)
    sample = documents[:TOKENIZER_DOCUMENTS]
    tokenizer = train_tokenizer(
        (d.prompt + d.given + d.answer for d in sample), recipe.vocab_size, recipe.context_length
    )
    model, losses = train_from_scratch(recipe, seed, tokenizer, documents, progress)
    return model, tokenizer, losses


def train_from_scratch(
    recipe: Recipe,
    seed: int,
    tokenizer: Any,
    documents: Sequence[Document],
    progress: Callable[[int, int, str], None],
) -> tuple[Any, list[float]]:
    """Train a new model on ``documents``, ``base_steps`` batches of them. Returns ``(model, losses)``."""
    torch.manual_seed(seed)
    model = new_model(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        share = (step - recipe.warmup) / max(recipe.base_steps - recipe.warmup, 1)
        return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * share))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    encoded = encode(tokenizer, documents)
    sampler = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    model.set_attn_implementation("eager")  # on a CPU, at these lengths, the plain product is the fastest
    for step, (ids, kind) in enumerate(batches(encoded, recipe.batch_size, tokenizer.pad_token_id, seed), 1):
        value = loss(model, ids, kind, recipe.prompt_weight, sampler)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(value.item())
        if step % 10 == 0 or step == recipe.base_steps:
            progress(step, recipe.base_steps, f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    model.eval()
    model.set_attn_implementation("sdpa")
    return model, losses
