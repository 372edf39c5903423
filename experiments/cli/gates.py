"""The commands `gates` and `replay`."""

from __future__ import annotations

from functools import partial
from typing import Any

import typer

from pingscope.experiments.cli.checks import disjoint, enough_benign, needs_labels
from pingscope.experiments.cli.endings import restored_sentence
from pingscope.experiments.cli.options import GatesOptions, ReplayOptions
from pingscope.experiments.cli.shared import (
    Episodes,
    Reader,
    admit_probes,
    load_probes,
    note_open_comment,
    open_model,
    open_run,
    write_results,
)
from pingscope.experiments.cli.tables import percent, print_table, said_missing
from pingscope.experiments.run.progress import say
from pingscope.experiments.studies.behaviour import DECISIONS
from pingscope.experiments.studies.gates.comparison import JUDGE, Settings, gating_study, random_name
from pingscope.experiments.studies.gates.fitting import in_first_half
from pingscope.experiments.studies.gates.replay import replay as replay_log
from pingscope.experiments.tasks.demonstrations import own_demonstrations
from pingscope.experiments.tasks.sources import environment_for
from pingscope.interp.errors import UserError
from pingscope.steering.directions import from_probes
from pingscope.steering.injection import Arm


def gates(options: GatesOptions) -> None:
    prefix, probes_path, out = options.needed_prefix(), options.probes, options.out
    note_open_comment(prefix)
    read = Reader(options.skip_bad)
    splits = {
        "--train": (options.train, read(options.train, options.n_train)),
        "--validation": (options.validation, read(options.validation, options.n_validation)),
        "--tasks": (options.tasks, read(options.tasks, options.n)),
    }
    for option, (spec, records) in splits.items():
        needs_labels(option, spec, records)
    disjoint(splits)
    training, choosing, shown = (records for _, records in splits.values())
    first = in_first_half([record.pair_id or record.id for record in choosing], options.seed)
    enough_benign("--validation", options.validation, choosing, first, options.fpr)
    known = load_probes(probes_path) if probes_path is not None else None
    run = open_run(options)
    model = open_model(options)
    directions: dict[str, Any] = {}
    notes: list[str] = []
    if known is not None and probes_path is not None:
        notes = admit_probes(known, model, probes_path, options.transfer)
        directions[probes_path.name] = from_probes(known)

    play = Episodes(out, options.max_turns, options.max_new_tokens)
    episodes = partial(play, model)
    attack = own_demonstrations(training, episodes(Arm("agent"), training)) if options.jailbreak else ()
    settings = Settings(options.fpr, options.n_choice, options.random_draws, options.hysteresis or None, options.seed)
    sections, found = gating_study(
        model, training, choosing, shown, environment_for, episodes, prefix, directions=directions, jailbreak=attack,
        settings=settings, say=say,
    )  # fmt: skip
    for name, gate in found.items():
        gate.save(out / "gates" / f"{name.removeprefix('agent+')}.json")
    gates_table(sections, read.skipped)
    said_missing({}, play.missing)
    for claim in sections["claims"]:
        say(f"{'holds' if claim['holds'] else 'does not hold'}: {claim['text']}")
    typer.echo(f"decisions: {out / DECISIONS}")
    behaviour = sections["behaviour"]
    ending = restored_sentence("The gated prefix", behaviour["agent+gated-prefix"], behaviour["agent"])
    write_results(run, model, sections, limits=notes, ending=ending, skipped=read.skipped, missing=play.missing)


def gates_table(sections: dict[str, Any], skipped: int = 0) -> None:
    """The arms in one table: safety, usefulness, over-refusal, what fired, side effects, robustness."""
    gates, paired = sections["gates"], sections["paired"]
    rows = []
    for arm, rates in sections["behaviour"].items():

        def cell(label: str, name: str, rates: dict[str, Any] = rates) -> Any:
            return rates.get(label, {}).get(JUDGE, {}).get(name)

        lost = paired.get(arm, {}).get("benign", {}).get(JUDGE, {}).get("success_rate")
        opened = gates["fired"].get(arm, {})
        kl = gates["coherence"].get(arm, {}).get("kl", {}).get("value")
        attacked = gates["jailbreak"].get(arm, {}).get(JUDGE, {}).get("refusal_rate")
        rows.append(
            [
                arm.removeprefix("agent+"),
                percent(cell("harmful", "refusal_rate")),
                percent(cell("harmful", "attack_success_rate")),
                percent(cell("benign", "success_rate")),
                "/".join(percent(cell(label, "invalid_rate")).partition(" ")[0] for label in rates),
                "–" if not lost or lost["value"] is None else f"{100 * lost['value']:+.1f}",
                percent(cell("lookalike", "refusal_rate")),
                " / ".join(f"{100 * one['value']:.0f}" for one in opened.values()) or "–",
                "–" if kl is None else f"{kl:.3f}",
                percent(attacked),
            ]
        )
    head = [
        "arm",
        "harmful refused",
        "harmful done",
        "benign done",
        "invalid",
        "against agent",
        "look-alike refused",
        "gate opened",
        "KL",
        "jailbreak",
    ]
    sizes = {rates[label][JUDGE]["refusal_rate"]["n"] for rates in sections["behaviour"].values() for label in rates}
    print_table(
        head,
        rows,
        f"per cent [95% interval], n = {', '.join(map(str, sorted(sizes)))} a cell; jailbreak: harmful refused",
        skipped,
    )
    for arm, drawn in gates["controls"].items():
        print_table(
            ["random directions", "harmful refused"],
            [[random_name(arm, i), percent(one)] for i, one in enumerate(drawn, 1)],
            skipped=skipped,
        )


def replay(options: ReplayOptions) -> None:
    log, read = options.log, Reader(options.skip_bad)
    if not log.is_file():
        raise UserError(f"{log}: no such decision log; give the decisions.jsonl of a run")
    records = {record.id: record for spec in options.tasks for record in read(spec, options.limit)}
    model = open_model(options)
    found = replay_log(log, model, list(records.values()), environment_for)
    if not any(one.decisions for one in found):
        raise UserError(f"{log}: holds no decision of these tasks; give the whole log and the run's --tasks")
    rows = [[one.arm, one.gate, str(one.decisions), str(one.opened), str(len(one.mismatches))] for one in found]
    print_table(
        ["arm", "gate", "decisions", "opened", "mismatches"],
        rows,
        "scores recomputed and compared to the bit",
        read.skipped,
    )
    wrong = [line for one in found for line in one.mismatches]
    for line in wrong[:20]:
        say(line)
    if wrong:
        raise UserError(f"{log}: {len(wrong)} decisions were not recomputed to the bit; the first: {wrong[0]}")
    typer.echo(f"All {sum(one.decisions for one in found)} decisions were recomputed to the bit.")
