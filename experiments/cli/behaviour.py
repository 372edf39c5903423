"""The commands `evaluate`, `steer` and `inject`: what agents do, as they are, steered, and with injected text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pingscope.experiments.cli.checks import needs_labels
from pingscope.experiments.cli.endings import restored_sentence, said_of
from pingscope.experiments.cli.options import EvaluateOptions, InjectOptions, SteerOptions
from pingscope.experiments.cli.shared import (
    Episodes,
    Reader,
    admit_probes,
    choosing_and_shown,
    load_probes,
    named_arm,
    note_open_comment,
    open_model,
    open_run,
    write_results,
)
from pingscope.experiments.cli.tables import behaviour_table, percent, print_table, said_missing
from pingscope.experiments.run.progress import say
from pingscope.experiments.studies.behaviour import compare, possible_arms, rates
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError
from pingscope.steering.injection import Arm, comparison_arms
from pingscope.steering.phrases import shuffled_words


def evaluate(options: EvaluateOptions) -> None:
    if options.model.startswith("openai:"):
        from pingscope.experiments.cli.robustness import evaluate_endpoint

        evaluate_endpoint(options)
        return
    text = options.prefix_text()
    if "prefix" in options.arm:
        note_open_comment(text)
    read = Reader(options.skip_bad)
    records = read(options.tasks, options.limit)
    chosen = [named_arm(name, text) for name in options.arm]
    run = open_run(options)
    model = open_model(options)
    episodes = Episodes(options.out, options.max_turns, options.max_new_tokens)
    chosen, impossible = possible_arms(chosen, {"agent": model}, records[0])
    behaviour = {arm.name: rates(episodes(model, arm, records)) for arm in chosen}
    if not behaviour:
        raise UserError(f"--arm: none is possible here: {next(iter(impossible.values()))}")
    behaviour_table(behaviour, skipped=read.skipped)
    said_missing(impossible, episodes.missing)
    sections = {"behaviour": behaviour, "impossible": impossible}
    write_results(run, model, sections, ending=said_of(behaviour), skipped=read.skipped, missing=episodes.missing)


def steer(options: SteerOptions) -> None:
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
    from pingscope.steering.directions import from_probes

    read, seed, n_choice = Reader(options.skip_bad), options.seed, options.n_choice
    choosing, shown = choosing_and_shown(read, options.tasks, options.limit, options.validation, n_choice)
    needs_labels("--tasks", options.tasks, shown)
    needs_labels("--validation", options.validation or options.tasks, choosing)
    places = [str(parse(place)) for place in options.place]
    probes = load_probes(options.probes)
    direction = from_probes(probes)
    run = open_run(options)
    model = open_model(options)
    notes = admit_probes(probes, model, options.probes, options.transfer)
    layers = options.layers
    wanted = tuple(resolve_layers(layers, model.n_layers))
    sets = layer_sets(model.n_layers) if layers == "all" else {set_name(wanted): wanted}
    norms = residual_norms(model, choosing)
    episodes = Episodes(options.out, options.max_turns, options.max_new_tokens)

    def measure(arm: Arm, records: Sequence[Record]) -> Any:
        return rates(episodes(model, arm, records))

    plain = episodes(model, Arm("agent"), shown)
    shuffled = shuffled_direction(model, choosing, probes, seed)
    sections = steering_study(
        direction, control_directions(direction, options.random_draws, seed, shuffled), norms, sets, options.dose,
        measure, choosing, shown, places=places, sizes=Sizes(validation=n_choice, curve=0, control_curve=0),
        coherence=reference_coherence(model, shown, plain), exhaustive=options.exhaustive,
    )  # fmt: skip
    chosen = sections["steering_chosen"]
    table = {"agent": rates(plain)} | {
        f"{operator} {dose}": cell
        for operator, cells in sections["steering"].items()
        for dose, cell in cells[chosen["layers"]].items()
    }
    behaviour_table(table, skipped=read.skipped)
    said_missing({}, episodes.missing)
    kl = {dose: f"{effect['kl']['value']:.3f}" for dose, effect in sections["steering_coherence"].items()}
    search = sections["steering_validation"]["add"]
    say(
        f"chosen on validation: layers {chosen['layers']}, dose {chosen['dose']}, {chosen['place']}; selectivity "
        "(harmful refusal less over-refusal and lost benign success, 1 at best) "
        f"{chosen['selectivity_on_validation']:.2f} there, {chosen['selectivity_on_test']:.2f} on the tasks reported"
    )
    say(f"search: {search['spent']} of the {search['full']} runs per label of the full sweep")
    say("KL on benign text, nats a token, by dose: " + ", ".join(f"{dose}: {value}" for dose, value in kl.items()))
    best = sections["steering"]["add"][chosen["layers"]].get(str(chosen["dose"]), {})
    ending = restored_sentence(f"Steering layers {chosen['layers']} by dose {chosen['dose']}", best, rates(plain))
    sections["behaviour"] = {"agent": rates(plain), "agent+steer": best}
    write_results(run, model, sections, limits=notes, ending=ending, skipped=read.skipped, missing=episodes.missing)


def inject(options: InjectOptions) -> None:
    from pingscope.experiments.models.organism.comments import neutral_comments
    from pingscope.experiments.studies.first_token import first_token_mass
    from pingscope.experiments.tasks.demonstrations import COMPLIANCE, REFUSALS, read_demonstrations
    from pingscope.steering.injection import attacked

    text, seed = options.needed_prefix(), options.seed
    note_open_comment(text)
    read = Reader(options.skip_bad)
    records = read(options.tasks, options.limit)
    if (given := options.demonstrations) and (other := options.jailbreak) and given.resolve() == other.resolve():
        raise UserError(f"--jailbreak {other}: is also the file of --demonstrations; give demonstrations of compliance")
    safe = read_demonstrations(given) if given else REFUSALS
    compliant = read_demonstrations(options.jailbreak) if options.jailbreak else COMPLIANCE
    run = open_run(options)
    model = open_model(options)

    def count(phrase: str) -> int:
        return len(model.tokenizer(phrase, add_special_tokens=False)["input_ids"])

    arms = comparison_arms(
        text, neutral=neutral_comments(text, 2, count), shuffled=[shuffled_words(text, random.Random(seed))],
        demonstrations=safe, models=("agent",),
    )  # fmt: skip
    arms, impossible = possible_arms(arms, {"agent": model}, records[0])
    harmful = [record for record in records if record.label == "harmful"]
    attacks = [attacked(arm, compliant) for arm in arms] if harmful else []
    play = Episodes(options.out, options.max_turns, options.max_new_tokens)
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
    behaviour_table(behaviour, skipped=read.skipped)
    said_missing(impossible, play.missing)
    _paired_table(paired, mass, read.skipped)
    injection = {
        arm.name: {"text": arm.shown, "kind": arm.kind, "model": "agent", **behaviour[arm.name]} for arm in arms
    }
    sections = {"behaviour": behaviour, "paired": paired, "injection": injection, "first_token": mass}
    sections |= {"impossible": impossible}
    ending = restored_sentence("The prefix", behaviour["agent+prefix"], behaviour["agent"])
    write_results(run, model, sections, ending=ending, skipped=read.skipped, missing=play.missing)


PAIRED = (("harmful", "refusal_rate"), ("benign", "success_rate"), ("lookalike", "refusal_rate"))


def _paired_table(paired: Mapping[str, Any], mass: Mapping[str, Any], skipped: int) -> None:
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
    caption = "points against the agent on the same tasks (attacked arms: against the arm unattacked)"
    print_table(head, rows, caption, skipped)
