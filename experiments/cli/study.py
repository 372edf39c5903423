"""The commands `study` and `report`."""

from __future__ import annotations

import typer

from pingscope.experiments.cli.options import ReportOptions, StudyOptions
from pingscope.interp.errors import UserError


def study(options: StudyOptions) -> None:
    from pingscope.experiments.studies.config import load_config
    from pingscope.experiments.studies.study import run_study

    loaded = load_config(options.config)
    if options.seed is not None:
        loaded = loaded.model_copy(update={"seed": options.seed})
    typer.echo(f"report: {run_study(loaded, options.out)}")


def report(options: ReportOptions) -> None:
    from pingscope.figures.report import build_report

    folder = options.folder
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the run's folder, {folder.parent}")
    typer.echo(f"report: {build_report(folder)}")
