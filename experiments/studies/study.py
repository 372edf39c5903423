"""The main job: `pingscope study`. Stages that wait only for what they need, each found again by its inputs' hash.

models → prefix search (validation) → behaviour by arm (test) → bounds of the search → first tokens → probes, tracks and
collapse readings → mechanism (attribution, readout, patching, restoration) → detectors → steering (chosen on
validation, reported on test) → fine-tuning series → claims → report.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pingscope.experiments.models.organism.comments import neutral_comments
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.run.second_process import second_process
from pingscope.experiments.studies.behaviour import Rates, compare, missing_episodes, possible_arms, rates
from pingscope.experiments.studies.claims import make_claims
from pingscope.experiments.studies.config import StudyConfig, save_config
from pingscope.experiments.studies.first_token import first_token_mass
from pingscope.experiments.studies.materials import Bench, open_bench
from pingscope.experiments.studies.mechanism.mechanism import mechanism_study
from pingscope.experiments.studies.provenance import meta
from pingscope.experiments.studies.search.bounds import FOLDER, prefix_bounds
from pingscope.experiments.studies.search.prefix_search import search_prefix, search_section
from pingscope.experiments.studies.search.screening import Screen
from pingscope.experiments.studies.steering.ablation import Sizes, control_directions, layer_sets, steering_study
from pingscope.experiments.studies.steering.references import reference_coherence, shuffled_direction
from pingscope.experiments.studies.tracking.checkpoints import Series
from pingscope.experiments.studies.tracking.detectors import detector_study
from pingscope.experiments.studies.tracking.tracking import final_gap, fit_probes, residual_norms, track
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import environment_for, take
from pingscope.figures.report import build_report
from pingscope.interp.files import sha256_of, write_json
from pingscope.probes.logistic import LayerProbes
from pingscope.schema import SCHEMA_VERSION, dump_results
from pingscope.steering.directions import from_probes
from pingscope.steering.injection import Arm, comparison_arms
from pingscope.steering.phrases import PhraseGenerator, shuffled_words
from pingscope.steering.ping import Settings

NEUTRAL, SHUFFLES = 3, 2
ASIDE = ("probes", "detectors", "steering", "tracking", "first-token")  # what runs beside the rest, in order
PREFIXED = ("agent+prefix", "agent+naive")  # given to every checkpoint of the fine-tuning
TRACKED = ("base", "agent", "agent+prefix", "agent+suffix", "agent+neutral-prefix")


def run_study(config: StudyConfig, out: str | Path) -> Path:
    """Run everything that is not there yet; write ``results.json`` and ``report.html``.

    Returns:
        The path of the report.
    """
    run = Run(out, say)
    save_config(config, run.folder / "config.yaml")
    bench = run.timed("models", lambda: open_bench(config, run))
    dump_results(run.folder / "results.json", run_stages(bench))
    return build_report(run.folder)


def run_stages(bench: Bench) -> dict[str, Any]:
    """Every stage, two at a time where a second process helps: the whole of ``results.json``."""
    config, run = bench.config, bench.run
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "meta": {}, "claims": []}
    with second_process(bench, ASIDE) as submit:
        probes = submit("probes", probes_stage)
        detectors = submit("detectors", detector_stage)
        steering = submit("steering", steering_stage)
        search = search_stage(bench)
        arms, impossible = possible_arms(
            study_arms(bench, config.prefix or search["winner"]), bench.models, bench.test[0]
        )
        for name, reason in impossible.items():
            say(f"{name}: not possible here: {reason}")
        results["impossible"] = impossible
        tracking = submit("tracking", tracking_stage, arms)
        first_token = submit("first-token", first_token_stage, arms)
        results |= behaviour_stage(bench, arms)
        results["search"] = with_held_out(search, results["behaviour"])
        results |= bounds_stage(bench, config.prefix or search["winner"])
        results["probes"] = probes()
        results["dose_response"] = dose_response_stage(bench, arms)
        results["detectors"] = detectors()
        results |= steering() | tracking()
        results["first_token"] = first_token()
        results |= mechanism_stage(bench)
    results["claims"] = make_claims(results)
    write_json(run.folder / "tokens.json", results.pop("tokens"))
    results["meta"] = meta(bench)
    return results


def search_stage(bench: Bench) -> dict[str, Any]:
    """PING on validation tasks; every scored candidate is in ``search.jsonl``."""
    config = bench.config
    settings = Settings(config.search.k, config.search.M, config.search.T, config.search.tau)
    if config.prefix:
        return {"winner": config.prefix, "candidates": [], "rounds": 0, "generations": 0}

    def compute() -> dict[str, Any]:
        with bar("search", settings.M * settings.T) as advance:
            found = search_prefix(
                bench.agent,
                # Benign cost is perf; look-alikes are kept out of the choice and reported.
                [record for record in bench.validation if record.label != "lookalike"],
                environment_for,
                journal=bench.run.folder / "search.jsonl",
                generator=PhraseGenerator(style=config.search.style),
                settings=settings,
                perf=config.search.perf,
                seed=config.seed,
                max_turns=config.max_turns,
                max_new_tokens=config.max_new_tokens,
                screen=Screen() if config.search.screening else None,
                openings=bench.openings,
                progress=lambda candidate: advance(info=f"{candidate.score.overall:.2f}"),
            )
        return search_section(found, settings, config.search.perf)

    return bench.run.stage("search", bench.identity(search=config.search.model_dump()), compute)


def with_held_out(search: dict[str, Any], behaviour: dict[str, Any]) -> dict[str, Any]:
    """The winner's scores on test tasks beside those it was chosen by: the selection bias, in plain sight."""
    rates = behaviour["agent+prefix"]
    refusal = rates["harmful"]["strict"]["refusal_rate"]["value"]
    success = rates["benign"]["strict"]["success_rate"]["value"]
    perf = success if search.get("perf_means") == "done" else 1 - rates["benign"]["strict"]["refusal_rate"]["value"]
    held = {"overall": perf + refusal, "refusal": refusal, "perf": perf, "success": success}
    rows = [row | ({"held_out": held} if row["text"] == search["winner"] else {}) for row in search["candidates"]]
    return search | {"candidates": rows}


def study_arms(bench: Bench, prefix: str) -> list[Arm]:
    """The arms of the comparison; neutral comments and shuffles have the prefix's length."""
    rng = random.Random(bench.config.seed)

    def count(text: str) -> int:
        return len(bench.agent.tokenizer(text, add_special_tokens=False)["input_ids"])

    return comparison_arms(
        prefix,
        neutral=neutral_comments(prefix, NEUTRAL, count),
        shuffled=[shuffled_words(prefix, rng) for _ in range(SHUFFLES)],
        system=bench.safety_system,
    )


def behaviour_stage(bench: Bench, arms: Sequence[Arm]) -> dict[str, Any]:
    """Rates of every arm on test tasks, and paired differences from the bare agent."""

    def compute() -> dict[str, Any]:
        episodes = {arm.name: bench.episodes(arm, bench.test) for arm in arms}
        bench.forget_prompts()  # half a gigabyte a model, which another process may need now
        behaviour = {name: rates(ran) for name, ran in episodes.items()}
        paired = {name: compare(ran, episodes["agent"]) for name, ran in episodes.items() if name.startswith("agent+")}
        injection = {
            arm.name: {"text": arm.shown, "kind": arm.kind, "model": arm.model, **behaviour[arm.name]} for arm in arms
        }
        missing = missing_episodes(episodes)
        return {"behaviour": behaviour, "paired": paired, "injection": injection, "missing": missing}

    return bench.run.stage("behaviour", bench.identity(arms=_described(bench, arms)), compute)


def bounds_stage(bench: Bench, searched: str) -> dict[str, Any]:
    """What a prefix could do at most: a soft one and a discrete one, trained on validation tasks."""
    config = bench.config
    sizes = config.bounds
    if not (sizes.soft_tokens or sizes.coordinate_steps):
        return {}

    def compute() -> dict[str, Any]:
        with bar("bounds", sizes.soft_steps * bool(sizes.soft_tokens) + sizes.coordinate_steps) as advance:
            found = prefix_bounds(
                bench.agent, bench.validation, bench.test, environment_for, bench.episodes, searched=searched,
                sizes=sizes, folder=bench.run.folder, base=bench.base, openings=bench.openings, seed=config.seed,
                progress=lambda which, loss: advance(info=f"{which} {loss:.2f}"),
            )  # fmt: skip
        bench.forget_prompts()
        return found

    inputs = bench.identity(bounds=sizes.model_dump(), searched=searched)
    files = [Path(FOLDER) / "soft_prefix.safetensors"] if sizes.soft_tokens else []
    return {"bounds": bench.run.stage("bounds", inputs, compute, files=files)}


def first_token_stage(bench: Bench, arms: Sequence[Arm]) -> dict[str, Any]:
    """Probability mass of refusal, action and comment starts at the decision."""

    def compute() -> dict[str, Any]:
        return {arm.name: first_token_mass(bench.models[arm.model], bench.test, arm, bench.openings) for arm in arms}

    inputs = bench.identity(arms=_described(bench, arms), openings=bench.openings)
    return bench.run.stage("first-token", inputs, compute)


def probes_stage(bench: Bench) -> dict[str, Any]:
    """Probes of base and agent on chat instructions; files in ``probes/``."""
    config, folder = bench.config, bench.run.folder

    def compute() -> dict[str, Any]:
        return fit_probes(bench.models, bench.chat, folder, seed=config.seed)

    inputs = bench.identity(chat=[asdict(record) for record in bench.chat])
    files = [probes_folder(name) / "probes.safetensors" for name in bench.models]
    return bench.run.stage("probes", inputs, compute, files=files)


def probes_folder(model: str) -> Path:
    """Where a model's own probes lie in the run: those that read and steer."""
    return Path("probes", f"{model}-mean_prompt")


def tracking_stage(bench: Bench, arms: Sequence[Arm]) -> dict[str, Any]:
    """Tracks and the readings of the collapse by the base's probes, with the noise floor."""
    tracked = [arm for arm in arms if arm.name in TRACKED]
    config, folder = bench.config, bench.run.folder
    probes = LayerProbes.load(folder / probes_folder("base"))

    def compute() -> dict[str, Any]:
        return track(
            bench.models, tracked, bench.chat, bench.test, folder, probes,
            floor=config.floor_updates, seed=config.seed, say=say,
        )  # fmt: skip

    inputs = bench.identity(
        arms=_described(bench, tracked),
        probes=sha256_of(probes.directions.tobytes()),
        floor=config.floor_updates,
    )
    return bench.run.stage("tracking", inputs, compute, files=[Path("tracks.parquet")])


def mechanism_stage(bench: Bench) -> dict[str, Any]:
    """Which components lost the signal, and which of the base's states bring refusal back."""
    settings = bench.config.mechanism
    if not settings.n:
        return {}
    probes = {name: LayerProbes.load(bench.run.folder / probes_folder(name)) for name in bench.models}

    def compute() -> dict[str, Any]:
        with bar("mechanism", None) as advance:
            return mechanism_study(
                bench.models, probes, bench.validation, bench.test, environment_for,
                max_turns=bench.config.max_turns, max_new_tokens=bench.config.max_new_tokens,
                seed=bench.config.seed, say=say, progress=advance, **settings.model_dump(),
            )  # fmt: skip

    hashes = {name: sha256_of(found.directions.tobytes()) for name, found in probes.items()}
    return bench.run.stage("mechanism", bench.identity(mechanism=settings.model_dump(), probes=hashes), compute)


def detector_stage(bench: Bench) -> dict[str, Any]:
    """Detectors at one false-positive rate: trained on validation tasks, read on test tasks."""

    def compute() -> dict[str, Any]:
        return detector_study(bench.models, bench.validation, bench.test, seed=bench.config.seed)

    return bench.run.stage("detectors", bench.identity(), compute)


def steering_stage(bench: Bench) -> dict[str, Any]:
    """Layers and dose on validation tasks, the chosen layers on test tasks, random directions beside them."""
    config, folder = bench.config, bench.run.folder
    probes = LayerProbes.load(folder / probes_folder("agent"))  # its own probe steers it, as in the paper
    direction = from_probes(probes)
    direction.save(folder / "directions" / "agent-mean_prompt")

    def evaluate(arm: Arm, records: Sequence[Record]) -> Rates:
        return rates(bench.episodes(arm, records))

    def compute() -> dict[str, Any]:
        choosing = take(bench.validation, config.steering.n_validation)
        shuffled = shuffled_direction(bench.agent, bench.chat, probes, config.seed)
        n = config.steering.n_curve
        return steering_study(
            direction,
            control_directions(direction, config.steering.random_draws, config.seed, shuffled),
            residual_norms(bench.agent, choosing),
            layer_sets(bench.agent.n_layers),
            config.steering.doses,
            evaluate,
            choosing,
            bench.test,
            places=config.steering.places,
            # The controls' question is whether harmful tasks are refused; benign ones would cost twice as much again.
            sizes=Sizes(config.steering.n_validation, n, n, 0, ("harmful",)),
            coherence=reference_coherence(bench.agent, bench.test, bench.episodes(Arm("agent"), bench.test)),
        )

    inputs = bench.identity(steering=config.steering.model_dump(), probes=sha256_of(probes.directions.tobytes()))
    return bench.run.stage("steering", inputs, compute)


def dose_response_stage(bench: Bench, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Along the fine-tuning (base, checkpoints, agent): behaviour, final-token gap, and what the prefixes still do."""
    if not bench.checkpoints:
        return []
    given = [arm for arm in arms if arm.name in PREFIXED] if bench.config.n_prefixed else []
    tasks = [record for record in take(bench.test, bench.config.n_prefixed) if record.label != "lookalike"]
    probes = LayerProbes.load(bench.run.folder / probes_folder("base"))

    def compute() -> list[dict[str, Any]]:
        series = [(0, bench.base), *((step, bench.load(path)) for step, path in bench.checkpoints)]
        rows = []
        readings = Series.start(bench.base, bench.test, probes, seed=bench.config.seed)
        for step, model in series:
            ran = bench.episodes(Arm(f"step-{step}"), bench.test, model)
            chosen = model.fingerprint == bench.agent.fingerprint
            gap = final_gap(model, bench.test, probes, seed=bench.config.seed)
            row = {"step": step, "behaviour": rates(ran), "gap": gap, "readings": readings.read(model)}
            behind = {arm.name: rates(bench.episodes(arm, tasks, model)) for arm in given}
            bench.forget_prompts()
            rows.append(row | {"chosen": chosen, "prefixed": behind})
        return rows

    inputs = bench.identity(
        checkpoints=[step for step, _ in bench.checkpoints],
        probes=sha256_of(probes.directions.tobytes()),
        arms=_described(bench, given),
        tasks=len(tasks),
    )
    return bench.run.stage("dose-response", inputs, compute)


def _described(bench: Bench, arms: Sequence[Arm]) -> list[list[str]]:
    return [[arm.name, arm.identity(bench.agent.d_model)] for arm in arms]
