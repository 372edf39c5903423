"""Agentic supervised fine-tuning: `pingscope finetune --base MODEL --data demos.jsonl --out DIR`.

Demonstrations are conversations. Every trained assistant turn is one example: the loss is on that turn alone, and the
tokens are those of the base's chat template (:mod:`pingscope.interp.chat.training`), so that the tuned model reads what
it was trained on and stops where the base stops. Other defaults are the paper's (learning rate 1e-5, cosine schedule,
warm-up 0.1, one epoch).

Logits are computed where a token is trained and nowhere else, and the examples of a step are sorted by length before
they are split into forward passes: the gradient is the same, without most of the padding and of the memory.
"""

from __future__ import annotations

import inspect
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pingscope.experiments.models.low_rank import cut_adapter, keep_share
from pingscope.experiments.run.identity import code_version, model_identity
from pingscope.experiments.run.memory import freed_memory_kept
from pingscope.experiments.run.paths import check_output
from pingscope.experiments.run.progress import say
from pingscope.experiments.tasks.conversations import read_conversations
from pingscope.experiments.tasks.rows import Skipped
from pingscope.interp.chat.messages import Conversation
from pingscope.interp.chat.training import TrainingExample, training_examples
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json
from pingscope.interp.loading import load_model
from pingscope.interp.model.adapters import write_base
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.precision import computes_in

TooLong = Literal["error", "skip", "cut"]
Saved = Literal["model", "adapter"]
Average = Literal["tokens", "answers"]
RECORD = "finetune.json"


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is tuned.

    Attributes:
        lora_rank: 0 for full fine-tuning.
        max_length: tokens of the longest example; never more than the model's context.
        average: of the loss, over the trained tokens of a step, or over its answers, so that a long one counts as much
            as a short one.
        too_long: what becomes of a longer one: an error, left out, or cut at the end; the latter two are counted.
        save: the tuned model, or of a LoRA run the adapter alone (a PEFT folder that notes which base it belongs to).
        cut_rank: with ``save="adapter"``, cut it to so many directions afterwards (0: leave it as it was trained).
        share: with ``save="adapter"``, the part of the update that is kept: below 1, a model between base and tuned.
        keep_steps: with ``save="adapter"``, the adapter as it was after these steps is kept too, in ``step-NNN/``.

    Raises:
        UserError: a value outside its range; names the option.
    """

    lora_rank: int = 16
    learning_rate: float = 1e-5
    epochs: float = 1.0
    batch_size: int = 128
    micro_batch_size: int = 4
    warmup_ratio: float = 0.1
    average: Average = "tokens"
    max_length: int = 16384
    too_long: TooLong = "error"
    save: Saved = "model"
    cut_rank: int = 0
    share: float = 1.0
    keep_steps: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "lora_rank": self.lora_rank >= 0,
            "learning_rate": 0 < self.learning_rate <= 1,
            "epochs": 0 < self.epochs <= 10_000,
            "batch_size": self.batch_size >= 1,
            "micro_batch_size": self.micro_batch_size >= 1,
            "warmup_ratio": 0 <= self.warmup_ratio <= 1,
            "max_length": self.max_length >= 2,
            "share": 0 < self.share <= 1,
        }
        for name, holds in ranges.items():
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: outside its range; see --help")
        if self.save == "adapter" and not self.lora_rank:
            raise UserError("--save adapter: --lora-rank 0 trains every weight and leaves no adapter; save the model")
        if self.keep_steps and self.save != "adapter":
            raise UserError("--keep-steps: keeps adapters; add --save adapter")
        if self.share < 1 and self.save != "adapter":
            raise UserError("--share: scales an adapter; add --save adapter")
        if self.cut_rank and (self.save != "adapter" or not 0 < self.cut_rank < self.lora_rank):
            raise UserError(f"--cut-rank {self.cut_rank}: cuts an adapter below --lora-rank; add --save adapter")

    @property
    def micro(self) -> int:
        """Examples of one forward pass: the most allowed that split a batch evenly."""
        return max(n for n in range(1, self.micro_batch_size + 1) if self.batch_size % n == 0)


@dataclass(frozen=True)
class Encoded:
    """Examples to train on, and how many were left out or cut because they were too long."""

    examples: Sequence[TrainingExample]
    left_out: int = 0
    cut: int = 0


def encode(model: HookedModel, conversations: Sequence[Conversation], config: FinetuneConfig) -> Encoded:
    """Every trained turn of every conversation, within the cutoff and the model's context.

    Raises:
        UserError: an example that is too long, where the config does not say what to do with it; nothing is left.
    """
    limit = min(config.max_length, model.context_length)
    kept, left_out, cut = [], 0, 0
    for conversation in conversations:
        for example in training_examples(model, conversation):
            if len(example) > limit and config.too_long == "error":
                raise UserError(
                    f"demonstration {example.id}: {len(example)} tokens exceed {limit} (--max-length "
                    f"{config.max_length}, context {model.context_length}); choose --too-long skip or cut"
                )
            if len(example) > limit and config.too_long == "cut":
                example = replace(example, ids=example.ids[:limit], trained=example.trained[:limit])
                cut += any(example.trained)
            if len(example) > limit or not any(example.trained):
                left_out += 1
            else:
                kept.append(example)
    if not kept:
        raise UserError(f"no demonstration fits into {limit} tokens ({left_out} are longer); raise --max-length")
    return Encoded(kept, left_out, cut)


def finetune(
    base: str,
    data: str,
    out: Path,
    config: FinetuneConfig,
    *,
    options: Mapping[str, Any] | None = None,
    skipped: Skipped | None = None,
) -> dict[str, Any]:
    """Fine-tune ``base`` on ``data`` and save an ordinary Hugging Face folder (LoRA merged, or the adapter) to ``out``.

    A finished folder made from the same model, data and settings is returned as it is; an interrupted training goes
    on from its last checkpoint. The same inputs and seed give the same bytes. What is trained is float32, and saved in
    the base's own type: steps smaller than half precision resolves would be lost. Weights that LoRA leaves as they are
    stay in bfloat16 where they were loaded so and the processor computes in it.

    Args:
        options: passed on to :func:`pingscope.interp.loading.load_model`.
        skipped: takes rows of ``data`` that are bad.

    Returns:
        The training record that is also written to ``out/finetune.json``.

    Raises:
        UserError: ``out`` is an input, or holds another fine-tuning; a loss that is not finite.
    """
    check_output(out, {"--base": base, "--data": data})
    conversations = read_conversations(data, skipped)
    model = load_model(base, **(options or {}))
    identity = sha256_of(
        [
            model_identity(model),
            [asdict(conversation) for conversation in conversations],
            asdict(config),
            code_version("finetune"),
            [version(name) for name in ("torch", "transformers", "peft")],
        ]
    )
    if (out / RECORD).exists():
        record = read_json(out / RECORD)
        if record.get("identity") != identity:
            raise UserError(f"{out}: holds another fine-tuning (other model, data or settings); pass another --out")
        return record
    encoded = encode(model, conversations, config)
    for count, what in ((encoded.left_out, "left out"), (encoded.cut, "cut")):
        if count:
            say(f"note: {count} demonstrations are longer than the limit and were {what}")
    losses = _train(model, encoded.examples, config, out, identity)
    record = {
        "identity": identity,
        "base": base,
        "examples": len(encoded.examples),
        "left_out": encoded.left_out,
        "cut": encoded.cut,
        "skipped": len(skipped or ()),
        "config": asdict(config) | {"keep_steps": list(config.keep_steps)},  # as JSON reads it back
        "loss": losses,
    }
    write_json(out / RECORD, record)
    return record


def _train(
    model: HookedModel, examples: Sequence[TrainingExample], config: FinetuneConfig, out: Path, identity: str
) -> list[float]:
    """Train, save to ``out``, and return the losses logged on the way."""
    from transformers import Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(config.seed)  # before anything is drawn: LoRA's start is random too
    stored = {name: weight.dtype for name, weight in model.hf.named_parameters()}
    picks_logits = "logits_to_keep" in inspect.signature(model.hf.forward).parameters
    trained = _with_adapter(model.hf, config)
    work = out.with_name(f".{out.name}.{identity[:12]}")  # beside the result: same disk, and found again after a kill
    order = schedule(examples, config)
    last = math.ceil(len(order) / config.batch_size)
    if beyond := [step for step in config.keep_steps if not 0 < step < last]:
        raise UserError(
            f"--keep-steps {beyond[0]}: this training has the steps 1 to {last}; give steps before the last"
        )
    trainer = Trainer(
        model=trained,
        args=_arguments(config, len(order), work),
        train_dataset=[features(example) for example in order],
        data_collator=lambda batch: collate(batch, model.pad_id, picks_logits),
        compute_loss_func=partial(mean_answer_loss, config.batch_size) if config.average == "answers" else answer_loss,
        callbacks=[
            _stop_at_nonsense(),
            _keep(config.keep_steps, lambda folder: _save_adapter(model, trained, config, folder), out),
        ],
    )
    with freed_memory_kept():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    spoilt = next((name for name, weight in trained.named_parameters() if not weight.isfinite().all()), None)
    if spoilt is not None:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"training ended with weights that are no numbers ({spoilt}); lower --learning-rate")
    _save(model, trained, stored, config, out)
    shutil.rmtree(work, ignore_errors=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def schedule(examples: Sequence[TrainingExample], config: FinetuneConfig) -> list[TrainingExample]:
    """The examples of every step, one after the other: each epoch shuffled, each step's sorted by length."""
    rng = random.Random(f"finetune/{config.seed}")
    steps: list[TrainingExample] = []
    wanted = max(1, round(len(examples) * config.epochs))
    while len(steps) < wanted:
        shuffled = rng.sample(examples, len(examples))[: wanted - len(steps)]
        for start in range(0, len(shuffled), config.batch_size):
            steps += sorted(shuffled[start : start + config.batch_size], key=len)
    return steps


def _with_adapter(hf: Any, config: FinetuneConfig) -> Any:
    """What is trained is float32; what LoRA leaves as it is stays in bfloat16 where the processor computes in it."""
    if not config.lora_rank or not computes_in(hf.dtype, hf.device):
        hf.float()
    if not config.lora_rank:
        return hf
    from peft import LoraConfig, get_peft_model

    rank = config.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(hf, lora)


def _save(model: HookedModel, trained: Any, stored: Mapping[str, Any], config: FinetuneConfig, out: Path) -> None:
    """The tuned model in the base's own number format, or the adapter with a note of its base."""
    if config.save == "adapter":
        _save_adapter(model, trained, config, out)
    else:
        merged = trained.float().merge_and_unload() if config.lora_rank else trained
        for name, weight in merged.named_parameters():
            weight.data = weight.data.to(stored[name])
        merged.config.dtype = next(iter(stored.values()))
        merged.save_pretrained(out)
    model.tokenizer.save_pretrained(out)


def _save_adapter(model: HookedModel, trained: Any, config: FinetuneConfig, folder: Path) -> None:
    trained.save_pretrained(folder)
    if config.cut_rank:
        share = cut_adapter(folder, config.cut_rank)
        say(
            f"adapter: {config.cut_rank} of {config.lora_rank} directions hold {share:.0%} of the updates' squared norm"
        )
    if config.share < 1:
        keep_share(folder, config.share)
    if Path(model.name).is_dir():
        write_base(folder, Path(model.name))


def _keep(steps: Sequence[int], save: Callable[[Path], None], out: Path) -> Any:
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        """What the training had made of the adapter after certain steps: a dose series."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in steps:
                save(out / f"step-{state.global_step:03d}")

    return Keep()


def _arguments(config: FinetuneConfig, n_examples: int, work: Path) -> Any:
    from transformers import TrainingArguments

    steps = math.ceil(n_examples / config.batch_size)
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=config.micro,
        gradient_accumulation_steps=config.batch_size // config.micro,
        learning_rate=config.learning_rate,
        num_train_epochs=1,  # the order of all epochs is drawn beforehand
        train_sampling_strategy="sequential",
        warmup_steps=round(config.warmup_ratio * steps),
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        report_to=[],
        seed=config.seed,
        remove_unused_columns=False,
    )


def _stop_at_nonsense() -> Any:
    from transformers import TrainerCallback

    class StopAtNonsense(TrainerCallback):
        """A loss that is no number ends the training: nothing that follows could be used."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(float(loss)):
                shutil.rmtree(args.output_dir, ignore_errors=True)
                raise UserError(f"step {state.global_step}: the loss is {loss}; lower --learning-rate")

    return StopAtNonsense()


def features(example: TrainingExample) -> dict[str, list[int]]:
    labels = [token if flag else -100 for token, flag in zip(example.ids, example.trained, strict=True)]
    return {"input_ids": list(example.ids), "labels": labels}


def collate(batch: Sequence[dict[str, list[int]]], pad: int, picks_logits: bool) -> dict[str, Any]:
    """Examples padded on the right; padding carries no loss and is not attended to."""
    import torch

    width = max(len(item["input_ids"]) for item in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([item[name] + [fill] * (width - len(item[name])) for item in batch])

    lengths = torch.tensor([len(item["input_ids"]) for item in batch])
    labels = padded("labels", -100)
    features = {"input_ids": padded("input_ids", pad), "labels": labels}
    features["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return features | ({"logits_to_keep": _predicting(labels)} if picks_logits else {})


def _predicting(labels: Any) -> Any:
    """Positions [n_kept] whose next token is trained in any row of ``labels`` [n_rows, n_tokens]."""
    return (labels[:, 1:] != -100).any(0).nonzero().flatten()


def answer_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Cross-entropy of the trained tokens, averaged over those of the whole step."""
    losses, trained = _token_losses(outputs, labels)
    return losses.sum() / (trained.sum() if num_items_in_batch is None else num_items_in_batch)


def mean_answer_loss(batch_size: int, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Mean cross-entropy of each answer's trained tokens, averaged over the answers of the whole step."""
    losses, trained = _token_losses(outputs, labels)
    return (losses.sum(1) / trained.sum(1)).sum() / batch_size


def _token_losses(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """Cross-entropy [n_rows, n_kept] where any row trains, 0 at what a row itself does not train, and what it does."""
    from torch.nn.functional import cross_entropy

    at = _predicting(labels)
    logits = outputs.logits if outputs.logits.shape[1] == len(at) else outputs.logits[:, at]
    targets = labels[:, 1:][:, at]
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(targets), targets != -100
