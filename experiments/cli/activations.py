"""The commands `cache`, `probe` and `track`: from prompts to readings of activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import typer

from pingscope.experiments.cli.checks import needs_labels, safe_out
from pingscope.experiments.cli.options import CacheOptions, ProbeOptions, TrackOptions
from pingscope.experiments.cli.shared import (
    Reader,
    load_probes,
    note_open_comment,
    open_model,
    open_run,
    settled,
    write_results,
)
from pingscope.experiments.cli.tables import percent, print_table, signed
from pingscope.experiments.run.progress import bar, say
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm


def cache(options: CacheOptions) -> None:
    from pingscope.experiments.studies.tracking.probing import write_records
    from pingscope.experiments.tasks.presets import deduplicate
    from pingscope.interp.model.selection import parse
    from pingscope.interp.store.extraction import estimate, extract

    safe_out(options)
    read, without, prefix = Reader(options.skip_bad), options.without, options.prefix_text()
    note_open_comment(prefix)
    records = read(options.prompts, options.limit)
    if without:
        kept = deduplicate(records, read(without))
        say(f"{len(records) - len(kept)} of {len(records)} prompts are in {without} or came twice: left out")
        records = kept
    if not records:
        raise UserError(f"--prompts {options.prompts}: every one is also in --without; give other ones")
    where, layers, dtype, out = parse(options.positions), options.layers, options.dtype, options.out
    model = open_model(options, dtype=options.model_dtype)
    arm = Arm("cache", prefix=prefix or None, suffix=options.suffix or None)
    rows = [model.render(arm.apply(record.prompt())) for record in records]
    cost = estimate(model, rows, layers=layers, where=where, dtype=dtype, timed=True)
    minutes = (cost.seconds or 0) / 60
    say(f"{len(rows)} prompts, {cost.tokens} tokens to keep, {cost.bytes / 1e9:.3f} GB, about {minutes:.1f} min")
    with bar("cache", len(rows)) as advance:
        store = extract(model, rows, out, layers=layers, where=where, dtype=dtype, progress=advance)
    write_records(out, records, rows)
    aside = f"; {read.skipped} bad records were skipped" if read.skipped else ""
    typer.echo(f"{store.index.num_rows} tokens of {len(rows)} prompts were kept at {len(store.layers)} layers{aside}.")
    typer.echo(f"store: {out} ({store.index.num_rows} rows, layers {', '.join(map(str, store.layers))})")


def probe(options: ProbeOptions) -> None:
    from pingscope.experiments.studies.tracking.probing import probe_store
    from pingscope.probes.pooling import POOLINGS

    safe_out(options)
    pooling, out = options.pooling, options.out
    if pooling not in POOLINGS and not pooling.startswith(("mean:", "max:")):
        raise UserError(
            f"--pooling {pooling!r}: unknown; use one of {', '.join(POOLINGS)}, or mean: or max: and a selection"
        )
    C: float | Literal["cv"] = "cv" if options.C == "cv" else float(options.C)
    found = probe_store(options.store, out, pooling=pooling, C=C, other_path=options.other, seed=options.seed)
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
    best = max(table, key=lambda layer: table[layer]["auroc"]["value"])
    typer.echo(
        f"Layer {best} tells harmful from benign best: AUROC {percent(table[best]['auroc'])} per cent, with shuffled "
        f"labels {percent(table[best].get('shuffled_auroc'))} (n = {found['n']}, held out)."
    )
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


def track(options: TrackOptions) -> None:
    from pingscope.experiments.models.organism.train import OWN_MARK
    from pingscope.experiments.studies.tracking.given_probes import track_with

    prefix = options.prefix_text()
    note_open_comment(prefix)
    read = Reader(options.skip_bad)
    records = read(options.prompts, options.limit)
    needs_labels("--prompts", options.prompts, records)
    probes = load_probes(options.probes)
    run = open_run(options)
    models = {"agent": open_model(options)}
    arms = [Arm("agent")]
    if options.base:
        models["base"] = open_model(options, options.base, settled(options, models["agent"]))
        arms.insert(0, Arm("base", "base"))
    if prefix:
        arms += [Arm("agent+prefix", prefix=prefix), Arm("agent+suffix", suffix=prefix.strip())]
    sections = track_with(models, arms, probes, records, options.out, say=say, transfer=options.transfer)
    tokens = sections.pop("tokens")
    seen = {
        role
        for layers in sections["tracks"].values()
        for labels in layers.values()
        for by in labels.values()
        for role in by
    }
    columns = [role for role in ("system", "instruction", "page", "header", "final") if role in seen]
    for layer in sections["tracks"][arms[0].name]:
        rows = [
            [f"{arm} {label}", *(signed(by_role.get(role)) for role in columns)]
            for arm, by_layer in sections["tracks"].items()
            for label, by_role in by_layer[layer].items()
        ]
        print_table(
            [f"layer {layer}", *columns], rows, "mean safety logit, positive is harmful [95% interval over prompts]",
            read.skipped,
        )  # fmt: skip
    foreign = (Path(options.model) / OWN_MARK).exists() and any(record.source != "organism" for record in records)
    write_results(
        run, models, sections, tokens=tokens, limits=[FOREIGN_PROMPTS] if foreign else (),
        ending=_read(sections["tracks"]), skipped=read.skipped,
    )  # fmt: skip


def _read(tracks: dict[str, Any]) -> str:
    """The last layer's final-token logits of the agent, both labels side by side."""
    layers = tracks["agent"]
    last = max(layers, key=int)
    said = [f"{signed(by.get('final'))} on {label} prompts" for label, by in layers[last].items() if by.get("final")]
    return f"At the final token of layer {last} the agent's mean safety logit is {' and '.join(said)}."
