"""The commands `steer` and `inject`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.cli.shared import Episodes, check_width, choosing_and_shown, open_model, write_results
from pingscope.experiments.cli.tables import behaviour_table, percent, print_table
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import say
from pingscope.experiments.studies.behaviour import compare, rates
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import read_tasks
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm, comparison_arms
from pingscope.steering.phrases import shuffled_words


def steer_command(
    model_name: str,
    probes_path: Path,
    tasks: str,
    validation: str,
    out: Path,
    layers: str,
    doses: Sequence[float],
    places: Sequence[str],
    random_draws: int,
    exhaustive: bool,
    n_choice: int,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    seed: int,
    chat_template: Path | None,
) -> None:
    from pingscope.experiments.studies.steering.ablation import (
        Sizes,
        control_directions,
        layer_sets,
        set_name,
        steering_study,
    )
    from pingscope.experiments.studies.steering.references import reference_coherence, shuffled_direction
    from pingscope.experiments.studies.tracking.tracking import residual_norms
    from pingscope.interp.model.selection import parse, resolve_layers
    from pingscope.probes.logistic import LayerProbes
    from pingscope.steering.directions import from_probes

    choosing, shown = choosing_and_shown(tasks, limit, validation, n_choice)
    places = [str(parse(place)) for place in places]
    probes = LayerProbes.load(probes_path)
    direction = from_probes(probes)
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    check_width(probes, model, probes_path)
    wanted = tuple(resolve_layers(layers, model.n_layers))
    sets = layer_sets(model.n_layers) if layers == "all" else {set_name(wanted): wanted}
    norms = residual_norms(model, choosing)
    episodes = Episodes(out, max_turns, max_new_tokens)

    def evaluate(arm: Arm, records: Sequence[Record]) -> Any:
        return rates(episodes(model, arm, records))

    plain = episodes(model, Arm("agent"), shown)
    shuffled = shuffled_direction(model, choosing, probes, seed)
    sections = steering_study(
        direction, control_directions(direction, random_draws, seed, shuffled), norms, sets, doses, evaluate,
        choosing, shown, places=places, sizes=Sizes(validation=n_choice, curve=0, control_curve=0),
        coherence=reference_coherence(model, shown, plain), exhaustive=exhaustive,
    )  # fmt: skip
    chosen = sections["steering_chosen"]
    table = {"agent": rates(plain)} | {
        f"{operator} {dose}": cell
        for operator, cells in sections["steering"].items()
        for dose, cell in cells[chosen["layers"]].items()
    }
    behaviour_table(table)
    kl = {dose: f"{effect['kl']['value']:.3f}" for dose, effect in sections["steering_coherence"].items()}
    search = sections["steering_validation"]["add"]
    say(
        f"chosen on validation: layers {chosen['layers']}, dose {chosen['dose']}, {chosen['place']}; selectivity "
        f"{chosen['selectivity_on_validation']:.2f} there, {chosen['selectivity_on_test']:.2f} on the tasks reported"
    )
    say(f"search: {search['spent']} of the {search['full']} runs per label of the full sweep")
    say("KL on benign text, nats a token, by dose: " + ", ".join(f"{dose}: {value}" for dose, value in kl.items()))
    write_results(run, model, {"behaviour": {"agent": rates(plain)}, **sections})


def inject_command(
    model_name: str,
    text: str,
    tasks: str,
    demonstrations: Path | None,
    jailbreak: Path | None,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    seed: int,
    chat_template: Path | None,
) -> None:
    from pingscope.experiments.models.organism.comments import neutral_comments
    from pingscope.experiments.studies.first_token import first_token_mass
    from pingscope.experiments.tasks.demonstrations import COMPLIANCE, REFUSALS, read_demonstrations
    from pingscope.steering.injection import attacked

    if not text.strip():
        raise UserError("--text: is empty; give the text to inject")
    records = read_tasks(tasks, limit)
    safe = read_demonstrations(demonstrations) if demonstrations else REFUSALS
    compliant = read_demonstrations(jailbreak) if jailbreak else COMPLIANCE
    run = Run(out, say)
    model = open_model(model_name, chat_template)

    def count(phrase: str) -> int:
        return len(model.tokenizer(phrase, add_special_tokens=False)["input_ids"])

    arms = comparison_arms(
        text, neutral=neutral_comments(text, 2, count), shuffled=[shuffled_words(text, random.Random(seed))],
        demonstrations=safe, models=("agent",),
    )  # fmt: skip
    harmful = [record for record in records if record.label == "harmful"]
    attacks = [attacked(arm, compliant) for arm in arms] if harmful else []
    play = Episodes(out, max_turns, max_new_tokens)
    episodes = {arm.name: play(model, arm, records) for arm in arms}
    episodes |= {arm.name: play(model, arm, harmful) for arm in attacks}
    behaviour = {name: rates(ran) for name, ran in episodes.items()}
    # An attacked arm is compared with the same arm unattacked, every other one with the bare agent.
    by_id = {name: {episode.id: episode for episode in ran} for name, ran in episodes.items()}
    paired = {
        name: compare(
            ran, [by_id[name.removesuffix("+jailbreak") if "jailbreak" in name else "agent"][e.id] for e in ran]
        )
        for name, ran in episodes.items()
        if name != "agent"
    }
    mass = {arm.name: first_token_mass(model, records, arm) for arm in arms}
    behaviour_table(behaviour)
    _paired_table(paired, mass)
    injection = {
        arm.name: {"text": arm.shown, "kind": arm.kind, "model": "agent", **behaviour[arm.name]} for arm in arms
    }
    write_results(run, model, {"behaviour": behaviour, "paired": paired, "injection": injection, "first_token": mass})


PAIRED = (("harmful", "refusal_rate"), ("benign", "success_rate"), ("lookalike", "refusal_rate"))


def _paired_table(paired: Mapping[str, Any], mass: Mapping[str, Any]) -> None:
    """Differences on the same tasks in points, McNemar's p, and where the first token's probability lies."""
    rows = []
    for arm, cells in paired.items():
        row = [arm]
        for label, name in PAIRED:
            cell = cells.get(label, {}).get("strict", {}).get(name)
            known = cell is not None and cell["value"] is not None
            row.append(f"{100 * cell['value']:+.0f} (p {cell['p_value']:.2g})" if known else "–")
        first = mass.get(arm, {}).get("harmful", {}).get("refusal")
        rows.append([*row, percent(first)])
    head = ["arm", "harmful refused", "benign done", "look-alike refused", "refusal starts, harmful"]
    print_table(head, rows, "points against the agent on the same tasks (attacked arms: against the arm unattacked)")
