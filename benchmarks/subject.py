"""The model and the prompts that are measured: a real one's folder, or random weights of its shape.

Prompts are those of the natural tasks (``natural:test``: web pages of about 140 tokens, shell sessions of about 70).
Random weights get a byte-level tokenizer trained on these tasks and the same ChatML template, so that both read text of
much the same length; what a kernel takes does not depend on the numbers in it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import read_tasks
from pingscope.interp.chat.rendering import Rendered
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Subject:
    """What to measure on: a folder, or (``model`` empty) a shape of :data:`SHAPES`."""

    model: str = ""
    shape: str = "smollm2-135m"
    dtype: str = "float32"
    device: str = "cpu"

    def load(self) -> HookedModel:
        if self.model:
            return load_model(self.model, dtype=self.dtype, device=self.device)
        return random_model(self.shape, self.dtype, self.device)


def subject_options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark of a model takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", metavar="FOLDER", help="default: random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--docs", type=Path, default=None, help="Markdown file whose marked part is replaced")
    return parser


def subject_of(given: argparse.Namespace) -> Subject:
    return Subject(given.model, given.shape, given.dtype, given.device)


def random_model(shape: str, dtype: str, device: str) -> HookedModel:
    """A Llama with random weights, made on its device."""
    config = LlamaConfig(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return HookedModel(hf.eval(), natural_tokenizer(config.vocab_size), name=f"random weights, {shape}")


def natural_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the natural tasks' own text, of at most ``vocab_size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [part for one in read_tasks("natural:train", 100) for part in (one.system, one.instruction, one.context)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def natural_records(n: int) -> list[Record]:
    """``n`` natural test tasks of every kind in a fixed random order: web and shell, harmful, benign, look-alike."""
    records = read_tasks("natural:test")
    return random.Random(0).sample(records, n)


def natural_prompts(model: HookedModel, n: int) -> list[Rendered]:
    """Rendered prompts of ``n`` natural tasks."""
    return [model.render(record.prompt()) for record in natural_records(n)]


def lengths(rows: Sequence[Rendered]) -> str:
    """For a caption: how many prompts of how many tokens."""
    found = sorted(map(len, rows))
    return f"{len(rows)} prompts of {found[0]}-{found[-1]} tokens ({sum(found)} in all)"


def spelled(model: HookedModel) -> str:
    """For a caption: the model, its shape and its number format."""
    name = Path(model.name).name
    return f"{name}: {model.n_layers} layers x {model.d_model}, {str(model.hf.dtype).removeprefix('torch.')}"
