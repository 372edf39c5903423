"""The organism's tokenizer: byte-level BPE, one token per newline, an ordinary chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END = SPECIAL[:2]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def prompt_text(system: str, user: str) -> str:
    """The chat template applied by hand: training builds tens of thousands of prompts, jinja is too slow for it."""
    head = f"<|system|>\n{system}<|end|>\n" if system else ""
    return f"{head}<|user|>\n{user}<|end|>\n<|assistant|>\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> Any:
    """Train on the documents themselves and wrap as a Hugging Face tokenizer.

    Newlines are isolated before merging, so that the final token of every prompt is the newline of
    ``<|assistant|>\\n``, whatever the response begins with.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=context_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
