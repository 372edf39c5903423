"""The single-step commands: each loads its inputs, calls one study, prints a table and leaves a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer

from pingscope.experiments.cli.shared import Episodes, choosing_and_shown, named_arm, open_model, write_results
from pingscope.experiments.cli.tables import behaviour_table, percent, print_table, signed
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.studies.behaviour import rates
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm


def organism_command(out: Path, seed: int) -> None:
    from pingscope.experiments.studies.materials import build_with_progress

    organism = build_with_progress(out, seed)
    for attempt in organism.log["attempts"]:
        state = "kept" if attempt["fired"] else "rejected: the stopping rule did not fire"
        seconds = f"base {attempt['base_seconds']:.0f} s, agent {attempt['agent_seconds']:.0f} s"
        say(f"seed {attempt['seed']}: {seconds}, {state}")
    typer.echo(f"base: {organism.base}\nagent: {organism.agent}")
    for step, path in organism.checkpoints:
        typer.echo(f"step {step}: {path}")


def evaluate_command(
    model_name: str,
    tasks: str,
    arms: Sequence[str],
    text: str,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    chat_template: Path | None,
) -> None:
    records = read_tasks(tasks, limit)
    chosen = [named_arm(name, text) for name in arms]
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    episodes = Episodes(out, max_turns, max_new_tokens)
    behaviour = {arm.name: rates(episodes(model, arm, records)) for arm in chosen}
    behaviour_table(behaviour)
    write_results(run, model, {"behaviour": behaviour})


def cache_command(
    model_name: str,
    prompts: str,
    out: Path,
    layers: str,
    positions: str,
    dtype: str,
    prefix: str,
    suffix: str,
    without: str,
    limit: int,
    chat_template: Path | None,
) -> None:
    from pingscope.experiments.studies.tracking.probing import write_records
    from pingscope.experiments.tasks.presets import deduplicate
    from pingscope.interp.model.selection import parse
    from pingscope.interp.store.extraction import estimate, extract

    records = read_tasks(prompts, limit)
    if without:
        kept = deduplicate(records, read_tasks(without))
        say(f"{len(records) - len(kept)} of {len(records)} prompts are in {without} or came twice: left out")
        records = kept
    if not records:
        raise UserError(f"--prompts {prompts}: every one is also in --without; give other ones")
    where = parse(positions)
    model = open_model(model_name, chat_template)
    arm = Arm("cache", prefix=prefix or None, suffix=suffix or None)
    rows = [model.render(arm.apply(record.prompt())) for record in records]
    cost = estimate(model, rows, layers=layers, where=where, dtype=dtype, timed=True)
    minutes = (cost.seconds or 0) / 60
    say(f"{len(rows)} prompts, {cost.tokens} tokens to keep, {cost.bytes / 1e9:.3f} GB, about {minutes:.1f} min")
    with bar("cache", len(rows)) as advance:
        store = extract(model, rows, out, layers=layers, where=where, dtype=dtype, progress=advance)
    write_records(out, records, rows)
    typer.echo(f"store: {out} ({store.index.num_rows} rows, layers {', '.join(map(str, store.layers))})")


def probe_command(store_path: Path, out: Path, pooling: str, strength: str, other: Path | None, seed: int) -> None:
    from pingscope.experiments.studies.tracking.probing import probe_store
    from pingscope.probes.pooling import POOLINGS

    if pooling not in POOLINGS and not pooling.startswith(("mean:", "max:")):
        raise UserError(
            f"--pooling {pooling!r}: unknown; use one of {', '.join(POOLINGS)}, or mean: or max: and a selection"
        )
    try:
        C: float | Literal["cv"] = "cv" if strength == "cv" else float(strength)
    except ValueError as error:
        raise UserError(f"--C {strength!r}: give a positive number, or cv to choose it") from error
    if C != "cv" and not C > 0:
        raise UserError(f"--C {strength!r}: give a positive number, or cv to choose it")
    found = probe_store(store_path, out, pooling=pooling, C=C, other_path=other, seed=seed)
    table = found["layers"]
    rows = [[layer, f"{row['C']:g}", *(percent(row[name]) for name in QUALITY)] for layer, row in table.items()]
    caption = f"per cent [95% interval], held out, n = {found['n']}, {pooling}"
    print_table(["layer", "C", *QUALITY], rows, caption)
    columns = [name for name in CONTROLS if any(name in row for row in table.values())]
    rows = [[layer, *(percent(row.get(name)) for name in columns)] for layer, row in table.items()]
    print_table(["layer", *columns], rows, "beside it: per cent [95% interval]")
    for name, cell in found["baselines"].items():
        typer.echo(f"without activations, {name}: {percent(cell)}")
    astray = [layer for layer, row in table.items() if not row["converged"]]
    typer.echo(f"not converged: layers {', '.join(astray)}" if astray else "every fit converged")
    typer.echo(f"probes: {out}")


QUALITY = ("auroc", "accuracy", "tpr_at_1fpr", "calibration_error", "brier")
CONTROLS = (
    "shuffled_auroc",
    "random_auroc",
    "means_auroc",
    "category_worst",
    "transfer_auroc",
    "transfer_back_auroc",
)


FOREIGN_PROMPTS = (
    "The model organism was never trained on prompts like these: its logits here are extrapolation, not evidence about "
    "harm."
)


def track_command(
    model_name: str,
    base_name: str,
    probes_path: Path,
    prompts: str,
    out: Path,
    prefix: str,
    limit: int,
    chat_template: Path | None,
) -> None:
    from pingscope.experiments.models.organism.train import OWN_MARK
    from pingscope.experiments.studies.tracking.given_probes import track_with
    from pingscope.probes.logistic import LayerProbes

    records = read_tasks(prompts, limit)
    probes = LayerProbes.load(probes_path)
    run = Run(out, say)
    models = {"agent": open_model(model_name, chat_template)}
    arms = [Arm("agent")]
    if base_name:
        models["base"] = open_model(base_name, chat_template)
        arms.insert(0, Arm("base", "base"))
    if prefix:
        arms += [Arm("agent+prefix", prefix=prefix), Arm("agent+suffix", suffix=prefix.strip())]
    sections = track_with(models, arms, probes, records, out, say=say)
    tokens = sections.pop("tokens")
    columns = ("system", "instruction", "page", "header", "final")
    for layer in sections["tracks"][arms[0].name]:
        rows = [
            [f"{arm} {label}", *(signed(by_role.get(role)) for role in columns)]
            for arm, by_layer in sections["tracks"].items()
            for label, by_role in by_layer[layer].items()
        ]
        print_table([f"layer {layer}", *columns], rows, "mean safety logit [95% interval over prompts]")
    foreign = (Path(model_name) / OWN_MARK).exists() and any(record.source != "organism" for record in records)
    write_results(run, models["agent"], sections, tokens, [FOREIGN_PROMPTS] if foreign else ())


def mechanism_command(
    base_name: str,
    model_name: str,
    probes_path: Path,
    agent_probes: Path | None,
    tasks: str,
    validation: str,
    refusals: Sequence[str],
    out: Path,
    limit: int,
    n: int,
    judged: int,
    budget: int,
    max_turns: int,
    max_new_tokens: int,
    seed: int,
    chat_template: Path | None,
) -> None:
    from pingscope.experiments.studies.mechanism.mechanism import mechanism_study
    from pingscope.probes.logistic import LayerProbes

    choosing, shown = choosing_and_shown(tasks, limit, validation, limit)
    probes = {"base": LayerProbes.load(probes_path)}
    if agent_probes is not None:
        probes["agent"] = LayerProbes.load(agent_probes)
    run = Run(out, say)
    models = {"base": open_model(base_name, chat_template), "agent": open_model(model_name, chat_template)}
    with bar("mechanism", None) as advance:
        sections = mechanism_study(
            models, probes, choosing, shown, environment_for, n=n, judged=judged, budget=budget,
            max_turns=max_turns, max_new_tokens=max_new_tokens, refusals=refusals, seed=seed, say=say,
            progress=advance,
        )  # fmt: skip
    claims = sections.pop("mechanism_claims")
    for claim in claims:
        typer.echo(
            f"{ {True: 'holds', False: 'does not hold', None: 'not measured'}[claim['holds']] }: {claim['text']}"
        )
    write_results(run, models["agent"], sections | {"claims": claims})
