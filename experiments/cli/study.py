"""The commands `study` and `report`."""

from __future__ import annotations

import typer

from pingscope.experiments.cli.checks import safe_out
from pingscope.experiments.cli.endings import study_sentence
from pingscope.experiments.cli.options import ReportOptions, StudyOptions
from pingscope.experiments.studies.config import REAL, Organism, Real, StudyConfig, load_config, read_yaml
from pingscope.interp.errors import UserError
from pingscope.schema import load_results


def study(options: StudyOptions) -> None:
    from pingscope.experiments.studies.study import run_study

    loaded = load_config(REAL if options.real else options.config)
    if options.seed is not None:
        loaded = loaded.model_copy(update={"seed": options.seed})
    if options.train or options.no_comments:
        loaded = retrained(loaded, options)
    safe_out(options)
    keeps_results(loaded, options)
    page = run_study(loaded, options.out)
    typer.echo(study_sentence(load_results(options.out / "results.json").plain()))
    typer.echo(f"report: {page}")


def retrained(config: StudyConfig, options: StudyOptions) -> StudyConfig:
    """The config with models that are trained anew in the place of those that ship."""
    flag = "--train" if options.train else "--no-comments"
    if config.models.base:
        raise UserError(f"{flag}: trains the models that ship, but {options.config} names others; leave it out")
    if config.real.weights:
        if options.no_comments:
            raise UserError(f"{flag}: is a recipe of the model organism, but {options.config} asks for 'real'")
        return config.model_copy(update={"real": Real(weights="trained")})
    asked = config.organism
    weights = "trained" if options.train or asked.weights == "shipped" else asked.weights
    organism = Organism(weights=weights, comments=asked.comments and not options.no_comments)
    return config.model_copy(update={"organism": organism})


def keeps_results(config: StudyConfig, options: StudyOptions) -> None:
    """A finished study of another config is not replaced unasked; an unfinished one goes on as its stages allow."""
    kept = options.out / "config.yaml"
    if options.overwrite or not (options.out / "results.json").exists() or not kept.exists():
        return
    before, now = read_yaml(kept), config.model_dump(mode="json")
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{options.out}: holds a study of another config (differs in {', '.join(changed)}); pass another --out, or "
            "--overwrite to replace its results"
        )


def report(options: ReportOptions) -> None:
    from pingscope.figures.report import build_report

    folder = options.folder
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the run's folder, {folder.parent}")
    if not (folder / "results.json").exists():
        raise UserError(f"{folder}: holds no results.json; give the folder that a command wrote with --out")
    page = build_report(folder)
    typer.echo(study_sentence(load_results(folder / "results.json").plain()))
    typer.echo(f"report: {page}")
