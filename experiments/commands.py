"""The single-step commands: each loads its inputs, calls one study, prints a table and leaves a run's folder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import typer

from experiments.agents.records import Record
from experiments.behaviour import compare, rates, run_arm
from experiments.inputs import environment_for, read_tasks, read_template
from experiments.progress import bar, hide_weight_bars, say
from experiments.run import Run
from experiments.tables import behaviour_table, percent, print_table, signed
from interp.errors import UserError
from interp.io import write_json
from interp.model import HookedModel, load_model
from interp.prefill import PromptCache
from steering.injection import SAFETY_SYSTEM, Arm, comparison_arms
from steering.phrases import shuffled_words

SCHEMA_VERSION = 1
ARMS = ("plain", "naive", "prefix", "suffix", "system")


def open_model(name: str, chat_template: Path | None) -> HookedModel:
    hide_weight_bars()
    model = load_model(name, chat_template=read_template(chat_template))
    say(f"model: {model.name} ({model.n_layers} layers x {model.d_model}, {model.device})")
    return model


def write_results(
    folder: Path,
    model: HookedModel,
    sections: dict[str, Any],
    tokens: list[Any] | None = None,
    limits: Sequence[str] = (),
) -> None:
    """``results.json`` of one command, and the report of what is in it."""
    from figures.report import build_report

    meta = {
        "title": model.name,
        "versions": {name: version(name) for name in ("pingscope", "torch", "transformers")},
        "models": {"agent": {"id": model.name, "fingerprint": model.fingerprint}},
        "template_hash": model.template_hash,
        "limits": list(limits),
    }
    for line in limits:
        say(f"note: {line}")
    if tokens is not None:
        write_json(folder / "tokens.json", tokens)
    write_json(folder / "results.json", {"schema_version": SCHEMA_VERSION, "meta": meta, "claims": [], **sections})
    typer.echo(f"report: {build_report(folder)}")


def organism_command(out: Path, seed: int) -> None:
    from experiments.bench import build_with_progress

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
    chosen = [_arm(name, text) for name in arms]
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    behaviour = {}
    for arm in chosen:
        behaviour[arm.name] = rates(_episodes(run, model, records, arm, max_turns, max_new_tokens))
    behaviour_table(behaviour)
    write_results(out, model, {"behaviour": behaviour})


def _arm(name: str, text: str) -> Arm:
    """One of :data:`ARMS`, on the model given."""
    if name not in ARMS:
        raise UserError(f"--arm {name!r}: unknown; use one of {', '.join(ARMS)}")
    if name in ("prefix", "suffix") and not text:
        raise UserError(f"--arm {name}: needs --text, the text to inject")
    return {
        "plain": Arm("agent"),
        "naive": Arm("agent+naive", prefix="I cannot"),
        "prefix": Arm("agent+prefix", prefix=text),
        "suffix": Arm("agent+suffix", suffix=text.strip()),
        "system": Arm("agent+system", system=text or SAFETY_SYSTEM),
    }[name]


def _episodes(
    run: Run,
    model: HookedModel,
    records: Sequence[Record],
    arm: Arm,
    max_turns: int,
    max_new_tokens: int,
    prompts: PromptCache | None = None,
) -> list[Any]:
    with bar(arm.name, len(records)) as advance:
        return run_arm(
            model, records, arm, environment_for,
            max_turns=max_turns, max_new_tokens=max_new_tokens,
            journal=run.folder / "generations.jsonl", prompts=prompts, progress=advance,
        )  # fmt: skip


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
    from experiments.agents.loaders import deduplicate
    from experiments.probing import write_records
    from interp.extract import estimate, extract
    from interp.selection import parse

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
    from experiments.probing import probe_store
    from probes.pooling import POOLINGS

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
    from experiments.organism.train import OWN_MARK
    from experiments.track_prompts import track_with
    from probes.logistic import LayerProbes

    records = read_tasks(prompts, limit)
    probes = LayerProbes.load(probes_path)
    Run(out, say)
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
    write_results(out, models["agent"], sections, tokens, [FOREIGN_PROMPTS] if foreign else ())


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
    from experiments.mechanism import mechanism_study
    from probes.logistic import LayerProbes

    choosing, shown = _choosing_and_shown(tasks, limit, validation, limit)
    probes = {"base": LayerProbes.load(probes_path)}
    if agent_probes is not None:
        probes["agent"] = LayerProbes.load(agent_probes)
    Run(out, say)
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
    write_results(out, models["agent"], sections | {"claims": claims})


def _choosing_and_shown(tasks: str, limit: int, validation: str, n: int) -> tuple[list[Record], list[Record]]:
    """Tasks that something is chosen on, and other ones that it is reported on."""
    from experiments.agents.loaders import deduplicate

    records = read_tasks(tasks, limit)
    # Without tasks of its own the choice gets every other one: what it found is never reported on what it saw.
    choosing = read_tasks(validation, n) if validation else records[1::2]
    shown = deduplicate(records, choosing)
    if not shown:
        raise UserError(f"--tasks {tasks}: every task is also in --validation; give other ones")
    return choosing, shown


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
    from experiments.steering_ablation import Sizes, control_directions, layer_sets, set_name, steering_study
    from experiments.steering_inputs import reference_coherence, shuffled_direction
    from experiments.tracking import residual_norms
    from interp.selection import parse, resolve_layers
    from probes.logistic import LayerProbes
    from steering.directions import from_probes

    choosing, shown = _choosing_and_shown(tasks, limit, validation, n_choice)
    places = [str(parse(place)) for place in places]
    probes = LayerProbes.load(probes_path)
    direction = from_probes(probes)
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    check_width(direction.vectors[direction.layers[0]].shape[0], model, probes_path)
    wanted = tuple(resolve_layers(layers, model.n_layers))
    sets = layer_sets(model.n_layers) if layers == "all" else {set_name(wanted): wanted}
    norms = residual_norms(model, choosing)
    prompts = PromptCache(model)

    def episodes(arm: Arm, records: Sequence[Record]) -> list[Any]:
        return _episodes(run, model, records, arm, max_turns, max_new_tokens, prompts)

    def evaluate(arm: Arm, records: Sequence[Record]) -> Any:
        return rates(episodes(arm, records))

    plain = episodes(Arm("agent"), shown)
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
    write_results(out, model, {"behaviour": {"agent": rates(plain)}, **sections})


def check_width(width: int, model: HookedModel, probes_path: Path) -> None:
    if width != model.d_model:
        raise UserError(
            f"{probes_path}: probes of width {width}, but {model.name} has d_model {model.d_model}; "
            "fit probes on this model's own store (pingscope cache, pingscope probe)"
        )


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
    from experiments.demonstrations import COMPLIANCE, REFUSALS, read_demonstrations
    from experiments.first_token import first_token_mass
    from experiments.organism.comments import neutral_comments
    from steering.injection import attacked

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
    prompts = PromptCache(model)
    episodes = {arm.name: _episodes(run, model, records, arm, max_turns, max_new_tokens, prompts) for arm in arms}
    episodes |= {arm.name: _episodes(run, model, harmful, arm, max_turns, max_new_tokens, prompts) for arm in attacks}
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
    write_results(out, model, {"behaviour": behaviour, "paired": paired, "injection": injection, "first_token": mass})


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
