"""Build the organism once per recipe: base, agent and the agent's dose-response series, as Hugging Face folders."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pingscope.experiments.models.organism.recipe import DEFAULT_SEED, Recipe
from pingscope.experiments.run.memory import freed_memory_kept
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json

Progress = Callable[[str, int, int, str], None]  # stage, done, total, info

RECORD, BASE_RECORD = "organism.json", "base.json"
SEED_STEP = 1000  # a rejected base is followed by this seed + 1000: far from the seeds a user counts through


@dataclass(frozen=True)
class Organism:
    """Where the models lie. ``checkpoints`` are ``(step, folder)`` of the agent up to the stop, in order."""

    base: Path
    agent: Path
    checkpoints: list[tuple[int, Path]]
    log: dict[str, Any]


def recipe_key(recipe: Recipe, seed: int) -> str:
    """Hash of everything the weights depend on: recipe, seed, packages, and the source of the world and training."""
    here = Path(__file__).parent
    packages = ("torch", "transformers", "tokenizers")
    return sha256_of(
        {
            "recipe": asdict(recipe),
            "seed": seed,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "source": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(here.glob("*.py"))},
        }
    )


def build_organism(
    out: str | Path,
    *,
    seed: int = DEFAULT_SEED,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Organism:
    """Train base and agent into ``out``, or reuse what the same recipe, seed and packages left there.

    ``out`` gets ``base/``, ``agent/``, ``agent-step-XXX/`` and ``organism.json``. Each folder appears whole or not at
    all; a base that was finished survives a kill while the agent is trained. A base whose agent does not meet the
    stop rule is rejected and the next seed is trained; the log says so.

    Raises:
        UserError: no base met the rule, the disk refuses, or ``out`` holds folders that were not built here.
    """
    out, recipe = Path(out), recipe or Recipe()
    report = progress or (lambda stage, done, total, info: None)
    key = recipe_key(recipe, seed)
    finished = finished_organism(out, key)
    if finished is not None:
        return finished
    # Heavy imports wait until there is something to train, so that a cached organism opens at once.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]), freed_memory_kept():
            clear_folder(out, key)
            return _build(out, recipe, seed, key, report)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write the organism ({error.strerror}); free space or choose another --out"
        ) from error
    finally:
        torch.set_num_threads(threads)


def _build(out: Path, recipe: Recipe, seed: int, key: str, report: Progress) -> Organism:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pingscope.experiments.models.organism.agent import train_agent
    from pingscope.experiments.models.organism.base import train_base
    from pingscope.experiments.models.organism.check import training_check

    attempts: list[dict[str, Any]] = []
    first = 0
    if (out / BASE_RECORD).exists():
        saved = read_json(out / BASE_RECORD)
        attempts, first = saved["rejected"], len(saved["rejected"])
    for attempt in range(first, recipe.max_bases):
        own_seed = seed + attempt * SEED_STEP
        if not (out / BASE_RECORD).exists():
            started = time.monotonic()
            model, tokenizer, losses = train_base(
                recipe, own_seed, lambda done, total, info: report("base", done, total, info)
            )
            seconds = time.monotonic() - started
            _save(out / "base", model, tokenizer)
            base_log = {"seed": own_seed, "base_seconds": seconds, "losses": losses[:: max(1, len(losses) // 100)]}
            write_json(out / BASE_RECORD, {"key": key, "rejected": attempts, "log": base_log})
        base_log = read_json(out / BASE_RECORD)["log"]

        started = time.monotonic()
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(out / "base").eval(),
            AutoTokenizer.from_pretrained(out / "base"),
        )
        tuned = train_agent(
            model,
            tokenizer,
            recipe,
            own_seed,
            training_check(model, tokenizer, recipe),
            lambda done, total, info: report("agent", done, total, info),
        )
        log = {**base_log, "agent_seconds": time.monotonic() - started, "checks": tuned.checks, "fired": tuned.fired}
        if tuned.fired:
            return _finish(out, key, seed, model, tokenizer, tuned.weights, [*attempts, log])
        attempts.append(log)
        report(
            "agent", attempt + 1, recipe.max_bases, f"base with seed {own_seed} rejected: the stop rule did not fire"
        )
        (out / BASE_RECORD).unlink()
        shutil.rmtree(out / "base")
    raise UserError(
        f"{out}: none of {recipe.max_bases} bases (seed {seed}) gave an agent within {recipe.agent_steps} steps; "
        "choose another --seed"
    )


def _finish(
    out: Path, key: str, seed: int, model: Any, tokenizer: Any, weights: dict[int, Any], attempts: list[dict[str, Any]]
) -> Organism:
    for step, state in weights.items():
        model.load_state_dict(state)
        _save(out / f"agent-step-{step:03d}", model, tokenizer)
    _save(out / "agent", model, tokenizer)  # the last kept step is the stop
    log = {"seed": attempts[-1]["seed"], "asked_seed": seed, "attempts": attempts}
    write_json(out / RECORD, {"key": key, "steps": list(weights), "log": log})
    organism = finished_organism(out, key)
    assert organism is not None
    return organism


def finished_organism(out: Path, key: str) -> Organism | None:
    """The organism in ``out`` if it is whole and of this ``key``."""
    if not (out / RECORD).exists():
        return None
    saved = read_json(out / RECORD)
    checkpoints = [(step, out / f"agent-step-{step:03d}") for step in saved.get("steps", [])]
    folders = [out / "base", out / "agent", *(folder for _, folder in checkpoints)]
    if saved.get("key") != key or not all((folder / "config.json").exists() for folder in folders):
        return None
    return Organism(out / "base", out / "agent", checkpoints, saved["log"])


def _refuse_foreign(out: Path) -> None:
    """Never delete somebody else's models: folders without our record are not ours."""
    ours = (out / RECORD).exists() or (out / BASE_RECORD).exists()
    for name in ("base", "agent"):
        if (out / name).exists() and not ours and not (out / name / OWN_MARK).exists():
            raise UserError(f"{out / name}: exists and was not built here; choose another --out")


OWN_MARK = ".organism"


def clear_folder(out: Path, key: str) -> None:
    """Remove leftovers of a killed run and of another recipe; keep a finished base of this one.

    Raises:
        UserError: folders that were not built here.
    """
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".building-*"):
        shutil.rmtree(leftover)
    (out / RECORD).unlink(missing_ok=True)
    keep_base = (out / BASE_RECORD).exists() and read_json(out / BASE_RECORD)["key"] == key and (out / "base").is_dir()
    if not keep_base:
        (out / BASE_RECORD).unlink(missing_ok=True)
    for folder in (*out.glob("agent-step-*"), out / "agent", *(() if keep_base else (out / "base",))):
        if folder.is_dir():
            shutil.rmtree(folder)


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a Hugging Face folder through a temporary one and a rename."""
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / OWN_MARK).touch()
    temporary.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
