"""`pingscope guard`, `attack`, `transfer`, and `evaluate` of agents behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer

from pingscope.experiments.agents.endpoint import Endpoint, run_endpoint
from pingscope.experiments.cli.shared import ARMS, Episodes, check_width, named_arm, open_model, write_results
from pingscope.experiments.cli.tables import behaviour_table, print_table, signed
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.studies.behaviour import rates
from pingscope.experiments.studies.robustness.attacks import attack_study, jailbreak_demonstrations, transfer_matrix
from pingscope.experiments.studies.robustness.guards import (
    FORMATS,
    Guard,
    classifier_guard,
    guard_study,
    lm_guard,
    probe_guard,
    probe_logits,
)
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.errors import UserError
from pingscope.interp.model.weights import load_checked
from pingscope.steering.injection import Arm

NO_ACTIVATIONS = "The model stands behind an endpoint: behaviour only. No activations, probes, tracks or steering."


def read_prefix(path: Path) -> str:
    """A prefix as the search wrote it, its newline included."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the prefix; give the prefix.txt of `pingscope search`") from error
    if not text.strip():
        raise UserError(f"{path}: holds no prefix; give the prefix.txt of `pingscope search`")
    return text


def guard_job(
    model_name: str,
    prefix_file: Path,
    tasks: str,
    guards: Sequence[str],
    probes_path: Path | None,
    validation: str,
    fpr: float,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    chat_template: Path | None,
) -> None:
    prefix, records = read_prefix(prefix_file), read_tasks(tasks, limit)
    if not guards and probes_path is None:
        raise UserError("guard: no guard given; pass --guard FORMAT:MODEL or --probes")
    if probes_path is not None and not validation:
        raise UserError("--probes: needs --validation, the tasks that set the threshold (never those of --tasks)")
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    chosen: dict[str, Guard] = {spec.partition(":")[0]: open_guard(spec) for spec in guards}
    thresholds: dict[str, Any] = {}
    if probes_path is not None:
        from pingscope.probes.detectors import threshold as threshold_at
        from pingscope.probes.logistic import LayerProbes

        probes = LayerProbes.load(probes_path)
        check_width(probes, model, probes_path)
        layer = probes.layers[len(probes.layers) // 2]
        benign = [r for r in deduplicate(read_tasks(validation, limit), records) if r.label == "benign"]
        if not benign:
            raise UserError(f"--validation {validation}: no benign task that is not in --tasks; give other ones")
        threshold = threshold_at(np.asarray(probe_logits(model, probes, layer, benign)), fpr)
        chosen["probe"] = probe_guard(model, probes, layer, threshold)
        thresholds = {"layer": layer, "threshold": threshold, "fpr": fpr, "n": len(benign)}
    evaluate = Episodes(out, max_turns, max_new_tokens)
    found = guard_study(chosen, prefix, records, partial(evaluate, model))
    behaviour_table(found["behaviour"])
    for name, said in found["verdicts"].items():
        typer.echo(f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in said.items()))
    write_results(
        run, model, {"behaviour": found["behaviour"], "guards": found | {"prefix": prefix, "probe": thresholds}}
    )


def open_guard(spec: str) -> Guard:
    """``llama-guard:MODEL`` and ``wildguard:MODEL`` (language models), ``classifier:MODEL`` (sequence classifier)."""
    kind, _, name = spec.partition(":")
    if not name or kind not in (*FORMATS, "classifier"):
        raise UserError(f"--guard {spec!r}: use one of {', '.join(f'{k}:MODEL' for k in (*FORMATS, 'classifier'))}")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        guard = load_checked(auto, name, name, dtype="auto", use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--guard {spec}: cannot load it ({' '.join(str(error).split())[:200]})") from error
    return classifier_guard(guard, tokenizer) if kind == "classifier" else lm_guard(guard, tokenizer, FORMATS[kind])


def attack_job(
    model_name: str,
    prefix_file: Path,
    tasks: str,
    demonstrations: str,
    shots: int,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    chat_template: Path | None,
) -> None:
    prefix, records = read_prefix(prefix_file), read_tasks(tasks, limit)
    others = deduplicate(read_tasks(demonstrations), records) if demonstrations else []
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    evaluate = Episodes(out, max_turns, max_new_tokens)
    examples: list[tuple[str, str]] = []
    if others:
        harmful = [record for record in others if record.label == "harmful"][: 10 * shots]
        examples = jailbreak_demonstrations(evaluate(model, Arm("agent"), harmful), harmful, shots)
        if len(examples) < shots:
            say(f"note: the agent carried out {len(examples)} of {shots} harmful demonstrations")
    found = attack_study(prefix, examples, records, partial(evaluate, model))
    behaviour_table(found["behaviour"])
    write_results(run, model, {"behaviour": found["behaviour"], "attacks": found | {"prefix": prefix}})


def transfer_job(
    model_names: Sequence[str],
    prefix_files: Sequence[Path],
    tasks: str,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    chat_template: Path | None,
) -> None:
    records = read_tasks(tasks, limit)
    if len(prefix_files) < 1 or len(set(model_names)) < len(model_names):
        raise UserError("transfer: give every --model once, and at least one --prefix-file")
    run = Run(out, say)
    models = {name: open_model(name, chat_template) for name in model_names}
    names = [*model_names, *(str(path) for path in prefix_files[len(model_names) :])]
    prefixes = {name: read_prefix(path) for name, path in zip(names, prefix_files, strict=False)}
    evaluate = Episodes(out, max_turns, max_new_tokens)
    found = transfer_matrix(models, prefixes, records, evaluate)
    rows = [
        [name, *(signed(cell["overall"]).lstrip("+") for cell in row.values())] for name, row in found["matrix"].items()
    ]
    print_table(["model \\ prefix of", "none", *prefixes], rows, "overall score [95% interval]: refusal + not refused")
    write_results(run, next(iter(models.values())), {"transfer": found})


def evaluate_endpoint_job(
    model_name: str,
    base_url: str,
    tasks: str,
    arms: Sequence[str],
    text: str,
    out: Path,
    limit: int,
    max_turns: int,
    max_new_tokens: int,
    per_minute: float,
) -> None:
    records = read_tasks(tasks, limit)
    chosen = [named_arm(name, text) for name in arms or ARMS[:1]]
    run = Run(out, say)
    endpoint = Endpoint(model_name, base_url or None, per_minute=per_minute, max_new_tokens=max_new_tokens)
    if any(arm.prefix for arm in chosen) and not endpoint.check_prefill():
        raise UserError(
            f"openai:{model_name}: the server does not continue a begun answer; use --arm suffix, or vLLM "
            "(continue_final_message)"
        )
    behaviour = {}
    for arm in chosen:
        with bar(arm.name, len(records)) as advance:
            episodes = run_endpoint(endpoint, records, environment_for, arm, max_turns=max_turns, progress=advance)
        behaviour[arm.name] = rates(episodes)
    behaviour_table(behaviour)
    write_results(run, endpoint, {"behaviour": behaviour}, limits=[NO_ACTIVATIONS])  # type: ignore[arg-type]
