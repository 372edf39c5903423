"""`pingscope guard`, `attack`, `transfer`, and `evaluate` of agents behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer

from pingscope.experiments.agents.endpoint import Endpoint, run_endpoint
from pingscope.experiments.cli.checks import disjoint, needs_labels
from pingscope.experiments.cli.endings import broken_sentences, restored_sentence, said_of, unread_hint
from pingscope.experiments.cli.options import (
    AttackOptions,
    EvaluateOptions,
    GuardOptions,
    ModelSettings,
    PrefixOptions,
    TransferOptions,
)
from pingscope.experiments.cli.parameters import flag_name
from pingscope.experiments.cli.shared import (
    Episodes,
    Reader,
    admit_probes,
    load_probes,
    named_arm,
    note_open_comment,
    open_model,
    open_run,
    settled,
    write_results,
)
from pingscope.experiments.cli.tables import behaviour_table, print_table, said_missing, signed
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.studies.behaviour import check_some_ran, missing_episodes, possible_arms, rates
from pingscope.experiments.studies.robustness.attacks import (
    attack_arms,
    attack_study,
    jailbreak_demonstrations,
    transfer_matrix,
)
from pingscope.experiments.studies.robustness.guards import (
    FORMATS,
    Guard,
    classifier_guard,
    guard_study,
    lm_guard,
    probe_guard,
    probe_logits,
)
from pingscope.experiments.tasks.sources import environment_for
from pingscope.interp.errors import UserError
from pingscope.interp.model.weights import load_checked
from pingscope.steering.injection import Arm

NO_ACTIVATIONS = "The model stands behind an endpoint: behaviour only. No activations, probes, tracks or steering."


def guard(options: GuardOptions) -> None:
    prefix, read, probes_path = options.needed_prefix(), Reader(options.skip_bad), options.probes
    note_open_comment(prefix)
    records = read(options.tasks, options.limit)
    for spec in options.guards:
        check_guard(spec)
    probes, benign = None, []
    if probes_path is not None:
        validation = read(options.validation, options.limit)
        disjoint({"--tasks": (options.tasks, records), "--validation": (options.validation, validation)})
        benign = [record for record in validation if record.label == "benign"]
        needs_labels("--validation", options.validation, validation, ["benign"])
        probes = load_probes(probes_path)
    run = open_run(options)
    model = open_model(options)
    chosen: dict[str, Guard] = {spec.partition(":")[0]: open_guard(spec) for spec in options.guards}
    thresholds: dict[str, Any] = {}
    notes: list[str] = []
    if probes is not None and probes_path is not None:
        from pingscope.probes.detectors import threshold as threshold_at

        notes = admit_probes(probes, model, probes_path, options.transfer)
        layer = probes.layers[len(probes.layers) // 2]
        threshold = threshold_at(np.asarray(probe_logits(model, probes, layer, benign)), options.fpr)
        chosen["probe"] = probe_guard(model, probes, layer, threshold)
        thresholds = {"layer": layer, "threshold": threshold, "fpr": options.fpr, "n": len(benign)}
    evaluate = Episodes(options.out, options.max_turns, options.max_new_tokens)
    found = guard_study(chosen, prefix, records, partial(evaluate, model))
    behaviour_table(found["behaviour"], skipped=read.skipped)
    said_missing({}, evaluate.missing)
    for name, said in found["verdicts"].items():
        typer.echo(f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in said.items()))
    write_results(
        run, model, {"behaviour": found["behaviour"], "guards": found | {"prefix": prefix, "probe": thresholds}},
        limits=notes, skipped=read.skipped, missing=evaluate.missing,
        ending=restored_sentence("The prefix", found["behaviour"]["agent+prefix"], found["behaviour"]["agent"]),
    )  # fmt: skip


def check_guard(spec: str) -> None:
    kind, _, name = spec.partition(":")
    if not name or kind not in (*FORMATS, "classifier"):
        raise UserError(f"--guard {spec!r}: use one of {', '.join(f'{k}:MODEL' for k in (*FORMATS, 'classifier'))}")


def open_guard(spec: str) -> Guard:
    """``llama-guard:MODEL`` and ``wildguard:MODEL`` (language models), ``classifier:MODEL`` (sequence classifier)."""
    check_guard(spec)
    kind, _, name = spec.partition(":")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        guard = load_checked(auto, name, name, dtype="auto", use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--guard {spec}: cannot load it ({' '.join(str(error).split())[:200]})") from error
    return classifier_guard(guard, tokenizer) if kind == "classifier" else lm_guard(guard, tokenizer, FORMATS[kind])


def attack(options: AttackOptions) -> None:
    prefix, read, shots = options.needed_prefix(), Reader(options.skip_bad), options.shots
    note_open_comment(prefix)
    records = read(options.tasks, options.limit)
    others = read(options.demonstrations) if options.demonstrations else []
    if options.demonstrations:
        disjoint({"--tasks": (options.tasks, records), "--demonstrations": (options.demonstrations, others)})
        needs_labels("--demonstrations", options.demonstrations, others, ["harmful"])
    run = open_run(options)
    model = open_model(options)
    evaluate = Episodes(options.out, options.max_turns, options.max_new_tokens)
    examples: list[tuple[str, str]] = []
    if others:
        harmful = [record for record in others if record.label == "harmful"][: 10 * shots]
        examples = jailbreak_demonstrations(evaluate(model, Arm("agent"), harmful), harmful, shots)
        if len(examples) < shots:
            say(f"note: the agent carried out {len(examples)} of {shots} harmful demonstrations")
    _, impossible = possible_arms(attack_arms(prefix, examples), {"agent": model}, records[0])
    found = attack_study(prefix, examples, records, partial(evaluate, model), without=impossible)
    behaviour = found["behaviour"]
    behaviour_table(behaviour, skipped=read.skipped)
    said_missing(impossible, evaluate.missing)
    sections = {"behaviour": behaviour, "attacks": found | {"prefix": prefix}, "impossible": impossible}
    ending = restored_sentence("Unattacked, the prefix", behaviour["agent+prefix"], behaviour["agent"])
    write_results(
        run, model, sections, ending=" ".join([ending, *broken_sentences(behaviour)]), skipped=read.skipped,
        missing=evaluate.missing,
    )  # fmt: skip


def transfer(options: TransferOptions) -> None:
    texts = [PrefixOptions(prefix_file=path).needed_prefix() for path in options.prefix_file] or list(options.prefix)
    read = Reader(options.skip_bad)
    records = read(options.tasks, options.limit)
    needs_labels("--tasks", options.tasks, records)
    run = open_run(options)
    first, *others = options.model
    models = {first: open_model(options, first)}
    models |= {name: open_model(options, name, settled(options, models[first])) for name in others}
    further = options.prefix_file[len(models) :] or options.prefix[len(models) :]
    prefixes = dict(zip([*options.model, *map(str, further)], texts, strict=True))
    evaluate = Episodes(options.out, options.max_turns, options.max_new_tokens)
    found = transfer_matrix(models, prefixes, records, evaluate)
    shown = short_names(["none", *prefixes])
    for name, row in found["matrix"].items():
        typer.echo(f"{name}, without a prefix and with that of:")
        behaviour_table({shown[source]: cell["behaviour"] for source, cell in row.items()}, skipped=read.skipped)
    rows = [
        [name, *(signed(cell["overall"]).lstrip("+") for cell in row.values())] for name, row in found["matrix"].items()
    ]
    print_table(
        ["model \\ prefix of", *shown.values()],
        rows,
        "overall score [95% interval]: refusal + not refused",
        read.skipped,
    )
    said_missing({}, evaluate.missing)
    helped = sum(
        cell["overall"]["value"] > row["none"]["overall"]["value"]
        for row in found["matrix"].values() for name, cell in row.items() if name != "none"
    )  # fmt: skip
    pairs = len(models) * len(prefixes)
    ending = (
        f"A prefix raises the overall score in {helped} of {pairs} pairs of model and prefix ({len(records)} tasks)."
    )
    hints = [unread_hint({name: row["none"]["behaviour"]}) for name, row in found["matrix"].items()]
    write_results(
        run,
        models,
        {"transfer": found},
        ending=ending,
        hint="\n".join(filter(None, hints)),
        skipped=read.skipped,
        missing=evaluate.missing,
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names as a table shows them: of a path its last part, where no other has the same."""
    last = {name: Path(name).name or name for name in names}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def evaluate_endpoint(options: EvaluateOptions) -> None:
    read, name = Reader(options.skip_bad), options.model.removeprefix("openai:")
    untouched = type(options).model_fields
    for field in ModelSettings.model_fields:
        if getattr(options, field) != untouched[field].default:
            raise UserError(
                f"{flag_name(type(options), field)}: belongs to a local model; leave it out with openai:NAME"
            )
    records = read(options.tasks, options.limit)
    chosen = [named_arm(arm, options.prefix_text()) for arm in options.arm]
    run = open_run(options)
    endpoint = Endpoint(
        name, options.base_url or None, per_minute=options.per_minute, max_new_tokens=options.max_new_tokens
    )
    if any(arm.prefix for arm in chosen) and not endpoint.check_prefill():
        raise UserError(
            f"openai:{name}: the server does not continue a begun answer; use --arm suffix, or vLLM "
            "(continue_final_message)"
        )
    ran = {}
    for arm in chosen:
        with bar(arm.name, len(records)) as advance:
            ran[arm.name] = run_endpoint(
                endpoint, records, environment_for, arm, max_turns=options.max_turns, progress=advance
            )
    check_some_ran(ran)
    behaviour, missing = {name: rates(episodes) for name, episodes in ran.items()}, missing_episodes(ran)
    behaviour_table(behaviour, skipped=read.skipped)
    said_missing({}, missing)
    write_results(
        run,
        endpoint,
        {"behaviour": behaviour},
        limits=[NO_ACTIVATIONS],
        ending=said_of(behaviour),
        skipped=read.skipped,
        missing=missing,
    )
