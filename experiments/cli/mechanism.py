"""The command `mechanism`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import typer

from pingscope.experiments.cli.checks import needs_labels
from pingscope.experiments.cli.options import MechanismOptions
from pingscope.experiments.cli.shared import (
    Reader,
    choosing_and_shown,
    load_probes,
    open_model,
    open_run,
    settled,
    write_results,
)
from pingscope.experiments.run.identity import code_version, model_identity
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.tasks.sources import environment_for
from pingscope.interp.files import sha256_of

SETTINGS = {"n", "judged", "budget", "max_turns", "max_new_tokens", "refusal", "seed"}


def mechanism(options: MechanismOptions) -> None:
    from pingscope.experiments.studies.mechanism.mechanism import mechanism_study

    limit = options.limit
    read = Reader(options.skip_bad)
    choosing, shown = choosing_and_shown(read, options.tasks, limit, options.validation, limit)
    needs_labels("--tasks", options.tasks, shown)
    needs_labels("--validation", options.validation or options.tasks, choosing)
    probes = {"base": load_probes(options.probes)}
    if options.agent_probes is not None:
        probes["agent"] = load_probes(options.agent_probes)
    run = open_run(options)
    models = {"base": open_model(options, options.base)}
    models["agent"] = open_model(options, dtype=settled(options, models["base"]))
    inputs = {
        "models": [model_identity(model) for model in models.values()],
        "probes": [sha256_of(found.directions.tobytes()) for found in probes.values()],
        "tasks": [asdict(record) for record in (*choosing, *shown)],
        "settings": options.model_dump(mode="json", include=SETTINGS),
        "code": code_version("study"),
        "pingscope version": version("pingscope"),
    }
    with bar("mechanism", None) as advance:
        sections = mechanism_study(
            models, probes, choosing, shown, environment_for, n=options.n, judged=options.judged,
            budget=options.budget, max_turns=options.max_turns, max_new_tokens=options.max_new_tokens,
            refusals=options.refusal, seed=options.seed, transfer=options.transfer, say=say, progress=advance,
            keep=lambda name, compute: run.stage(name, inputs, compute),
        )  # fmt: skip
    claims = sections.pop("mechanism_claims")
    for claim in claims:
        typer.echo(
            f"{ {True: 'holds', False: 'does not hold', None: 'not measured'}[claim['holds']] }: {claim['text']}"
        )
    if read.skipped:
        typer.echo(f"{read.skipped} bad records skipped")
    write_results(run, models, sections | {"claims": claims}, ending=_ending(claims), skipped=read.skipped)


def _ending(claims: list[dict[str, Any]]) -> str:
    held = sum(claim["holds"] is True for claim in claims)
    unknown = sum(claim["holds"] is None for claim in claims)
    return f"{held} of {len(claims)} statements about the mechanism hold; {unknown} could not be measured."
