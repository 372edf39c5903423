"""The commands `organism`, `finetune` and `doctor`."""

from __future__ import annotations

import math

import typer

from pingscope.experiments.cli.checks import safe_out
from pingscope.experiments.cli.options import DoctorOptions, FinetuneOptions, OrganismOptions
from pingscope.experiments.run.progress import say
from pingscope.experiments.tasks.sources import read_template
from pingscope.interp.errors import UserError


def organism(options: OrganismOptions) -> None:
    from pingscope.experiments.studies.materials import build_with_progress

    built = build_with_progress(options.out, options.seed)
    for attempt in built.log["attempts"]:
        state = "kept" if attempt["fired"] else "rejected: the stopping rule did not fire"
        seconds = f"base {attempt['base_seconds']:.0f} s, agent {attempt['agent_seconds']:.0f} s"
        say(f"seed {attempt['seed']}: {seconds}, {state}")
    typer.echo(f"base: {built.base}\nagent: {built.agent}")
    for step, path in built.checkpoints:
        typer.echo(f"step {step}: {path}")


def finetune(options: FinetuneOptions) -> None:
    from pingscope.experiments.models.finetune import FinetuneConfig, read_demonstrations
    from pingscope.experiments.models.finetune import finetune as train

    safe_out(options)
    read_demonstrations(options.data)  # before the model is loaded
    names = ("lora_rank", "learning_rate", "epochs", "batch_size", "micro_batch_size", "max_length", "seed")
    chosen = {name: getattr(options, name) for name in names}
    if options.too_long != "error":
        chosen["too_long"] = options.too_long
    settings = FinetuneConfig(**chosen)
    template = read_template(options.chat_template)
    record = train(options.base, str(options.data), options.out, settings, chat_template=template)
    losses = record["loss"]
    if not all(map(math.isfinite, losses)):
        raise UserError(f"{options.out}: the loss is not finite; train again with a smaller --learning-rate")
    trend = f"; the loss went from {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    typer.echo(f"The model was tuned on {record['examples']} examples{trend}.")
    typer.echo(f"model: {options.out}")


def doctor(options: DoctorOptions) -> None:
    from pingscope.experiments.cli.shared import open_model
    from pingscope.experiments.models.doctor import doctor_command

    safe_out(options)
    doctor_command(
        lambda: open_model(options, attention=options.attention), options.backend, options.max_tokens, options.out
    )
