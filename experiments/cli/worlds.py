"""The command `tasks`: a built-in world's tasks and training rows as files."""

from __future__ import annotations

import typer

from pingscope.experiments.cli.checks import safe_out
from pingscope.experiments.cli.options import TasksOptions


def tasks(options: TasksOptions) -> None:
    from pingscope.experiments.tasks.natural.files import write_natural

    safe_out(options)
    made = write_natural(options.out, options.seed, options.n)
    counts = f"{len(made.train)} tasks to train on, {len(made.validation)} to choose by, {len(made.test)} to report"
    typer.echo(f"The natural world was written: {counts}; no family is in two of them.")
    typer.echo(f"folder: {options.out}")
