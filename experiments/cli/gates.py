"""The commands `gates` and `replay`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from pingscope.experiments.cli.shared import Episodes, check_width, open_model, write_results
from pingscope.experiments.cli.tables import percent, print_table
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import say
from pingscope.experiments.studies.behaviour import DECISIONS
from pingscope.experiments.studies.gates.comparison import JUDGE, Settings, gating_study
from pingscope.experiments.studies.gates.replay import replay
from pingscope.experiments.tasks.demonstrations import own_demonstrations
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.errors import UserError
from pingscope.probes.logistic import LayerProbes
from pingscope.steering.directions import from_probes
from pingscope.steering.injection import Arm


def gates_command(
    model_name: str,
    prefix: str,
    train: str,
    validation: str,
    tasks: str,
    probes_path: Path | None,
    out: Path,
    fpr: float,
    hysteresis: float,
    random_draws: int,
    n_train: int,
    n_validation: int,
    n_choice: int,
    n: int,
    jailbreak: bool,
    max_turns: int,
    max_new_tokens: int,
    seed: int,
    chat_template: Path | None,
) -> None:
    if not prefix.strip():
        raise UserError("--prefix: is empty; give the response prefix, for example from a search's prefix.txt")
    # A shell passes no line ends, and files lose the last one: a comment needs it, or the model goes on in its line.
    prefix = prefix.replace("\\n", "\n")
    if prefix.lstrip().startswith("#") and not prefix.endswith("\n"):
        prefix += "\n"
    training, choosing, shown = (
        read_tasks(spec, limit) for spec, limit in ((train, n_train), (validation, n_validation), (tasks, n))
    )
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    directions = {}
    if probes_path is not None:
        probes = LayerProbes.load(probes_path)
        check_width(probes, model, probes_path)
        directions[probes_path.name] = from_probes(probes)

    episodes = partial(Episodes(out, max_turns, max_new_tokens), model)
    attack = own_demonstrations(training, episodes(Arm("agent"), training)) if jailbreak else ()
    sections, found = gating_study(
        model, training, choosing, shown, environment_for, episodes, prefix, directions=directions, jailbreak=attack,
        settings=Settings(fpr, n_choice, random_draws, hysteresis or None, seed), say=say,
    )  # fmt: skip
    for name, gate in found.items():
        gate.save(out / "gates" / f"{name.removeprefix('agent+')}.json")
    gates_table(sections)
    for claim in sections["claims"]:
        say(f"{'holds' if claim['holds'] else 'does not hold'}: {claim['text']}")
    typer.echo(f"decisions: {out / DECISIONS}")
    write_results(run, model, sections)


def gates_table(sections: dict[str, Any]) -> None:
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
                percent(cell("benign", "success_rate")),
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
        "benign done",
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
    )
    for arm, drawn in gates["controls"].items():
        print_table(["random directions", "harmful refused"], [[arm, percent(one)] for one in drawn])


def replay_command(log: Path, model_name: str, tasks: Sequence[str], limit: int, chat_template: Path | None) -> None:
    records = {record.id: record for spec in tasks for record in read_tasks(spec, limit)}
    model = open_model(model_name, chat_template)
    found = replay(log, model, list(records.values()), environment_for)
    rows = [[one.arm, one.gate, str(one.decisions), str(one.opened), str(len(one.mismatches))] for one in found]
    print_table(["arm", "gate", "decisions", "opened", "mismatches"], rows, "scores recomputed and compared to the bit")
    wrong = [line for one in found for line in one.mismatches]
    for line in wrong[:20]:
        say(line)
    if wrong:
        raise UserError(f"{log}: {len(wrong)} decisions were not recomputed to the bit; the first: {wrong[0]}")
