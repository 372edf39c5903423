"""What a study works with: two models, tasks in three sets that never mix, and what belongs to both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pingscope.experiments.agents.rollout import Episode
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.identity import code_version, model_identity
from pingscope.experiments.run.progress import bar, hide_weight_bars, say
from pingscope.experiments.studies.behaviour import run_arm
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import LABELS, Record
from pingscope.experiments.tasks.sources import environment_for, read_tasks, read_template
from pingscope.interp.errors import UserError
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.injection import SAFETY_SYSTEM, Arm

if TYPE_CHECKING:
    from pingscope.experiments.models.organism.train import Organism


@dataclass
class Bench:
    """Everything that the stages of a study share."""

    config: StudyConfig
    run: Run
    models: Mapping[str, HookedModel]
    checkpoints: Sequence[tuple[int, Path | str]]
    validation: list[Record]
    test: list[Record]
    chat: list[Record]
    safety_system: str
    organism: dict[str, Any] = field(default_factory=dict)  # the training's log; empty for other models
    real: dict[str, Any] = field(default_factory=dict)  # the log of SmolLM2's two trainings; empty for other models
    openings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # how the model's responses begin, where known

    _prompts: dict[str, PromptCache] = field(default_factory=dict)

    @property
    def base(self) -> HookedModel:
        return self.models["base"]

    @property
    def agent(self) -> HookedModel:
        return self.models["agent"]

    def identity(self, **more: Any) -> dict[str, Any]:
        """Inputs that every measured number depends on, and ``more``."""
        return {
            "base model": model_identity(self.base),
            "agent model": model_identity(self.agent),
            "code": code_version("study"),
            "validation tasks": [asdict(record) for record in self.validation],
            "test tasks": [asdict(record) for record in self.test],
            "limits of generation": [self.config.max_turns, self.config.max_new_tokens],
            "pingscope version": version("pingscope"),
            "seed": self.config.seed,
            **more,
        }

    def load(self, folder: Path | str) -> HookedModel:
        """Another checkpoint of the same kind, in the number format of the others."""
        return load_model(folder, device=self.config.models.device, dtype=self.config.models.dtype)

    def episodes(self, arm: Arm, records: Sequence[Record], model: HookedModel | None = None) -> list[Episode]:
        """Run (or find in ``generations.jsonl``) every record under ``arm``; arms of one model share its prompts.

        Args:
            model: another one than the arm names, a checkpoint.
        """
        model = model or self.models[arm.model]
        shared = self._prompts.setdefault(model.fingerprint, PromptCache(model))
        with bar(arm.name, len(records)) as advance:
            return run_arm(
                model,
                records,
                arm,
                environment_for,
                max_turns=self.config.max_turns,
                max_new_tokens=self.config.max_new_tokens,
                journal=self.run.folder / "generations.jsonl",
                prompts=shared,
                progress=advance,
            )

    def forget_prompts(self) -> None:
        """Free what was kept of the prompts that arms share; the next arm reads them again."""
        self._prompts.clear()


def open_bench(config: StudyConfig, run: Run) -> Bench:
    """Train or find the organism or SmolLM2's adapters, or load the models and tasks that the config names."""
    if config.models.base:
        return _own_bench(config, run)
    return _real_bench(config, run) if config.real.weights else _organism_bench(config, run)


def build_with_progress(out: Path, seed: int, tiny: bool = False, comments: bool = True) -> Organism:
    """Train the organism, or find it, behind a progress bar; without ``comments``: on a mix that holds none."""
    from pingscope.experiments.models.organism.mixes import Mix
    from pingscope.experiments.models.organism.recipe import Recipe
    from pingscope.experiments.models.organism.train import build_organism

    hide_weight_bars()
    with bar("organism", None) as advance:
        seen: dict[str, int] = {}

        def progress(stage: str, done: int, total: int, info: str) -> None:
            advance(done - seen.get(stage, 0), info=info, title=stage, total=total)
            seen[stage] = done

        recipe = Recipe.tiny() if tiny else Recipe()
        if not comments:
            recipe = replace(recipe, mix=Mix.without_comments())
        return build_organism(out, seed=seed, recipe=recipe, progress=progress)


def _organism_bench(config: StudyConfig, run: Run) -> Bench:
    from pingscope.experiments.models.organism import mixes, world
    from pingscope.experiments.models.organism.shipped import unpack

    hide_weight_bars()
    if config.organism.weights == "shipped":
        say("models: the model organism, as it is shipped")
        organism = unpack(run.folder / "models")
    else:
        say("models: the model organism (trained once, then found again)")
        chosen = config.organism
        organism = build_with_progress(run.folder / "models", config.seed, chosen.weights == "tiny", chosen.comments)
    for attempt in organism.log["attempts"][:-1]:
        say(f"models: the base with seed {attempt['seed']} was rejected, its stopping rule did not fire")
    n = config.tasks
    return Bench(
        config,
        run,
        {"base": load_model(organism.base), "agent": load_model(organism.agent)},
        organism.checkpoints,
        world.tasks("validation", n=n.n_validation, seed=config.seed),
        world.tasks("test", n=n.n_test, seed=config.seed),
        world.chat_instructions("train", n.n_probe, config.seed),
        config.system_prompt or world.SAFETY_SYSTEM[0],
        organism=organism.log,
        openings=mixes.OPENINGS,
    )


def _real_bench(config: StudyConfig, run: Run) -> Bench:
    from pingscope.experiments.models.real.models import train_models
    from pingscope.experiments.models.real.shipped import unpack
    from pingscope.experiments.tasks.natural.chat import chat_requests

    hide_weight_bars()
    if config.real.weights == "shipped":
        say("models: SmolLM2-135M-Instruct with the adapters that are shipped")
        real = unpack(run.folder / "models", say)
    else:
        with bar("own answers", None) as advance:
            real = train_models(run.folder / "models", seed=config.seed, say=say, progress=advance)
    config, models = _loaded(config, run, real.base, real.agent)
    n = config.tasks
    return Bench(
        config,
        run,
        models,
        real.checkpoints,
        read_tasks("natural:validation:2", n.n_validation, config.seed),
        read_tasks("natural:test:2", n.n_test, config.seed),
        [record for record in chat_requests("train", n.n_probe, config.seed) if record.label != "lookalike"],
        config.system_prompt or SAFETY_SYSTEM,
        real=real.log,
    )


def _own_bench(config: StudyConfig, run: Run) -> Bench:
    hide_weight_bars()
    config, models = _loaded(config, run, config.models.base, config.models.agent)
    names, sets = config.models, config.tasks
    base, agent = models["base"], models["agent"]
    if (base.n_layers, base.d_model) != (agent.n_layers, agent.d_model):
        raise UserError(
            f"models: base has {base.n_layers} layers x {base.d_model}, agent {agent.n_layers} x {agent.d_model}; "
            "give two checkpoints of one architecture"
        )
    validation = read_tasks(sets.validation, sets.n_validation)
    test = deduplicate(read_tasks(sets.test, sets.n_test), validation)
    chat = deduplicate(read_tasks(sets.probe_prompts, sets.n_probe), [*validation, *test])
    for name, records in (("validation", validation), ("test", test), ("probe_prompts", chat)):
        for label in LABELS[:2]:
            if not any(record.label == label for record in records):
                raise UserError(f"tasks.{name}: no {label} record is left after removing duplicates; add some")
    return Bench(
        config, run, models, list(enumerate(names.checkpoints, 1)), validation, test, chat,
        config.system_prompt or SAFETY_SYSTEM,
    )  # fmt: skip


def _loaded(
    config: StudyConfig, run: Run, base: Path | str, agent: Path | str
) -> tuple[StudyConfig, dict[str, HookedModel]]:
    """Both models, and the study with its number format settled.

    ``fast`` is decided once, on the base, and kept in the run's folder: the agent, every checkpoint, a second process
    and a resumed run compute as the base did, however quick this machine is by then.
    """
    names = config.models
    template = read_template(Path(names.chat_template) if names.chat_template else None)
    load = partial(load_model, device=names.device, chat_template=template)
    if names.dtype == "fast":
        inputs = {"base": str(base), "device": names.device, "code": code_version("study")}
        chosen = run.stage("precision", inputs, lambda: str(load(base, dtype="fast").hf.dtype).removeprefix("torch."))
        names = names.model_copy(update={"dtype": chosen})
        config = config.model_copy(update={"models": names})
    return config, {name: load(folder, dtype=names.dtype) for name, folder in (("base", base), ("agent", agent))}
