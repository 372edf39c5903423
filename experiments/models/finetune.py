"""Agentic supervised fine-tuning: `pingscope finetune --base MODEL --data demos.jsonl --out DIR`.

Demonstrations are conversations. Every assistant turn is one example: the loss is on that turn alone, and the tokens
are those of :func:`pingscope.interp.chat.rendering.render`, so that training and evaluation read the same ids.
Defaults are the paper's (learning rate 1e-5, cosine schedule, warm-up 0.1, one epoch).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pingscope.interp.chat.rendering import Prompt, render
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class FinetuneConfig:
    lora_rank: int = 16  # 0: full fine-tuning
    learning_rate: float = 1e-5
    epochs: float = 1.0
    batch_size: int = 128
    micro_batch_size: int = 4
    warmup_ratio: float = 0.1
    max_length: int = 16384
    seed: int = 0


def read_demonstrations(path: str | Path) -> list[Prompt]:
    """Read conversations, one JSON object a line, as one :class:`Prompt` with a ``response`` per assistant turn.

    Takes ``messages`` or ``conversations`` with ``role``/``content`` or ShareGPT's ``from``/``value``.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable JSONL file of demonstrations") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.extend(_examples(line, f"{path}:{number}"))
    if not prompts:
        raise UserError(f"{path}: holds no assistant turn; write one conversation a line")
    return prompts


def _examples(line: str, where: str) -> list[Prompt]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}); write one conversation a line") from error
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise UserError(f"{where}: field 'messages' (or 'conversations') is missing or not a list")
    system: str | None = None
    asked: str | None = None
    history: list[tuple[str, str]] = []
    examples = []
    for turn in turns:
        role = _SPEAKERS.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise UserError(f"{where}: a turn needs a role (system, user, assistant) and a text content")
        if role == "system":
            system = text
        elif role == "user":
            asked = text
        else:
            if asked is None:
                raise UserError(f"{where}: an assistant turn comes before any user turn")
            name = f"{row.get('id', where)}#{len(history)}"
            examples.append(Prompt(name, asked, system=system, response=text, demonstrations=tuple(history)))
            history.append((asked, text))
            asked = None
    return examples


def encode(model: HookedModel, prompt: Prompt, max_length: int) -> dict[str, list[int]]:
    """Token ids of a demonstration, closed by the end-of-turn token, and labels: -100 outside the response."""
    row = render(model, prompt)
    closing = model.tokenizer.eos_token_id
    if closing is None:
        raise UserError(f"{model.name}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    ids = [*row.ids, closing]
    labels = [token if role == "response" else -100 for token, role in zip(row.ids, row.roles, strict=True)]
    if len(ids) > max_length:
        raise UserError(
            f"demonstration {prompt.id}: {len(ids)} tokens exceed the cutoff {max_length}; raise --max-length"
        )
    return {"input_ids": ids, "labels": [*labels, closing]}


def finetune(
    base: str, data: str, out: Path, config: FinetuneConfig, *, chat_template: str | None = None
) -> dict[str, Any]:
    """Fine-tune ``base`` on ``data`` and save an ordinary Hugging Face folder (LoRA is merged) to ``out``.

    A finished folder made from the same model, data and settings is returned as it is; an interrupted training goes
    on from its last checkpoint.

    Returns:
        The training record that is also written to ``out/finetune.json``.
    """
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    model = load_model(base, chat_template=chat_template)
    prompts = read_demonstrations(data)
    identity = sha256_of(
        {"base": model.fingerprint, "data": sha256_of(Path(data).read_bytes()), "config": vars(config)}
    )
    record_path = out / "finetune.json"
    if record_path.exists():
        record = read_json(record_path)
        if record["identity"] != identity:
            raise UserError(f"{out}: holds another fine-tuning (other model, data or settings); pass another --out")
        return record
    examples = [encode(model, prompt, config.max_length) for prompt in prompts]

    trained = model.hf
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        trained = get_peft_model(
            trained,
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=2 * config.lora_rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    pad = model.pad_id

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in batch)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([item[name] + [fill] * (width - len(item[name])) for item in batch])

        lengths = torch.tensor([len(item["input_ids"]) for item in batch])
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}

    micro = min(config.micro_batch_size, config.batch_size)
    work = out.with_name(f".{out.name}.{identity[:12]}")  # beside the result: same disk, and found again after a kill
    accumulate = max(1, config.batch_size // micro)
    steps = max(1, round(len(examples) / (micro * accumulate) * config.epochs))
    trainer = Trainer(
        model=trained,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            warmup_steps=round(config.warmup_ratio * steps),
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 20),
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            report_to=[],
            seed=config.seed,
            remove_unused_columns=False,
        ),
        train_dataset=examples,
        data_collator=collate,
    )
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    merged = trained.merge_and_unload() if config.lora_rank else trained
    merged.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    record = {
        "identity": identity,
        "base": base,
        "examples": len(examples),
        "config": vars(config),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    write_json(record_path, record)
    shutil.rmtree(work, ignore_errors=True)
    return record
