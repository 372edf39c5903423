"""What the commands share: how a model is opened, tasks are divided, episodes are run, and results are left."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pingscope.experiments.agents.rollout import Episode
from pingscope.experiments.run.folder import SCHEMA_VERSION, Run
from pingscope.experiments.run.progress import bar, hide_weight_bars, say
from pingscope.experiments.studies.behaviour import run_arm
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import environment_for, read_tasks, read_template
from pingscope.interp.errors import UserError
from pingscope.interp.files import write_json
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.loading import load_model
from pingscope.interp.model.belonging import transfer_note
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.injection import SAFETY_SYSTEM, Arm

if TYPE_CHECKING:
    from pingscope.probes.logistic import LayerProbes

ARMS = ("plain", "naive", "prefix", "suffix", "system")


class Episodes:
    """Runs arms on models, journalled in one folder; a model's prompts are read once."""

    def __init__(self, folder: Path, max_turns: int, max_new_tokens: int) -> None:
        self.folder, self.limits = folder, {"max_turns": max_turns, "max_new_tokens": max_new_tokens}
        self._prompts: dict[str, PromptCache] = {}

    def __call__(self, model: HookedModel, arm: Arm, records: Sequence[Record]) -> list[Episode]:
        prompts = self._prompts.setdefault(model.fingerprint, PromptCache(model))
        with bar(arm.name, len(records)) as advance:
            return run_arm(
                model, records, arm, environment_for, journal=self.folder / "generations.jsonl", prompts=prompts,
                progress=advance, **self.limits,
            )  # fmt: skip


def open_model(name: str, chat_template: Path | None) -> HookedModel:
    hide_weight_bars()
    model = load_model(name, chat_template=read_template(chat_template))
    say(f"model: {model.name} ({model.n_layers} layers x {model.d_model}, {model.device})")
    return model


def write_results(
    run: Run,
    model: HookedModel,
    sections: dict[str, Any],
    tokens: list[Any] | None = None,
    limits: Sequence[str] = (),
) -> None:
    """``results.json`` of one command, and the report of what is in it. Until here ``run`` keeps other writers out."""
    from pingscope.figures.report import build_report

    meta = {
        "title": model.name,
        "versions": {name: version(name) for name in ("pingscope", "torch", "transformers")},
        "models": {"agent": {"id": model.name, "fingerprint": model.fingerprint}},
        "template_hash": model.template_hash,
        "limits": list(limits),
    }
    for line in limits:
        say(f"note: {line}")
    if tokens is not None:
        write_json(run.folder / "tokens.json", tokens)
    write_json(run.folder / "results.json", {"schema_version": SCHEMA_VERSION, "meta": meta, "claims": [], **sections})
    typer.echo(f"report: {build_report(run.folder)}")


def choosing_and_shown(tasks: str, limit: int, validation: str, n: int) -> tuple[list[Record], list[Record]]:
    """Tasks that something is chosen on, and other ones that it is reported on."""
    records = read_tasks(tasks, limit)
    # Without tasks of its own the choice gets every other one: what it found is never reported on what it saw.
    choosing = read_tasks(validation, n) if validation else records[1::2]
    shown = deduplicate(records, choosing)
    if not shown:
        raise UserError(f"--tasks {tasks}: every task is also in --validation; give other ones")
    return choosing, shown


def check_width(probes: LayerProbes, model: HookedModel, path: Path, transfer: bool = False) -> list[str]:
    """Refuse probes of another model, unless the transfer is asked for; sentences on it for the results' limits."""
    note = transfer_note(probes.check_model(model, transfer=transfer, path=path))
    return [note] if note else []


def named_arm(name: str, text: str) -> Arm:
    """One of :data:`ARMS`, on the model given."""
    if name not in ARMS:
        raise UserError(f"--arm {name!r}: unknown; use one of {', '.join(ARMS)}")
    if name in ("prefix", "suffix") and not text:
        raise UserError(f"--arm {name}: needs --text, the text to inject")
    return {
        "plain": Arm("agent"),
        "naive": Arm("agent+naive", prefix="I cannot"),
        "prefix": Arm("agent+prefix", prefix=text),
        "suffix": Arm("agent+suffix", suffix=text.strip()),
        "system": Arm("agent+system", system=text or SAFETY_SYSTEM),
    }[name]
