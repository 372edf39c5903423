"""What models do: episodes of one arm, journalled, and the rates that are reported from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import comb
from pathlib import Path
from typing import Any

from pingscope.experiments.agents.judges import MODES
from pingscope.experiments.agents.rollout import Episode, MakeEnvironment, environment_name, run_episodes
from pingscope.experiments.run.identity import code_version, model_identity
from pingscope.experiments.studies.gates.replay import header
from pingscope.experiments.tasks.records import LABELS, Record
from pingscope.interp.errors import UserError
from pingscope.interp.files import append_jsonl, read_journal, sha256_of
from pingscope.interp.generate.prompt_cache import PromptCache
from pingscope.interp.model.hooked import HookedModel
from pingscope.probes.statistics import paired_difference, rate
from pingscope.steering.decisions import GateSession
from pingscope.steering.injection import Arm

# rates[label][judge][rate] = {"value", "ci", "n", "n_missing"}
Rates = dict[str, dict[str, dict[str, dict[str, Any]]]]

CHUNK = 128  # episodes between two entries in the journal
DECISIONS = "decisions.jsonl"  # beside the journal: what the gates of its arms decided


def evaluate_arm(
    model: HookedModel,
    records: Sequence[Record],
    arm: Arm,
    make_env: MakeEnvironment,
    *,
    max_turns: int = 6,
    max_new_tokens: int = 48,
    journal: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rates:
    """Run ``records`` under ``arm`` and count; see :func:`run_arm` and :func:`rates`."""
    episodes = run_arm(
        model,
        records,
        arm,
        make_env,
        max_turns=max_turns,
        max_new_tokens=max_new_tokens,
        journal=journal,
        progress=progress,
    )
    return rates(episodes)


def run_arm(
    model: HookedModel,
    records: Sequence[Record],
    arm: Arm,
    make_env: MakeEnvironment,
    *,
    max_turns: int = 6,
    max_new_tokens: int = 48,
    journal: str | Path | None = None,
    prompts: PromptCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Episodes in the order of ``records``; those the journal already holds are read, not run.

    A logged episode counts as the same one if all that decides it is the same (:mod:`experiments.run.identity`).
    The log holds ids and continuations, never an instruction. What the arm's gate decides is appended to
    ``decisions.jsonl`` beside it.
    """
    settings = sha256_of(
        [
            [model_identity(model), code_version("episodes"), arm.identity(model.d_model)],
            [environment_name(make_env), max_turns, max_new_tokens],
        ]
    )
    keys = [sha256_of([settings, asdict(record)])[:32] for record in records]
    logged = {row.get("key"): row for row in read_journal(journal)} if journal is not None else {}
    episodes = {key: Episode.from_row(logged[key]) for key in keys if key in logged}
    if progress is not None and episodes:
        progress(sum(key in episodes for key in keys))
    todo = [index for index, key in enumerate(keys) if key not in episodes]
    log = None if journal is None else Path(journal).with_name(DECISIONS)
    for start in range(0, len(todo), CHUNK):
        chunk = todo[start : start + CHUNK]
        # Decisions are written before the episodes: a kill between the two repeats some, it never loses one.
        session = None
        if arm.gate is not None:
            session = GateSession(arm.gate, log, header(model, arm, make_env, max_new_tokens))
        ran = run_episodes(
            model,
            [records[index] for index in chunk],
            make_env,
            arm,
            max_turns=max_turns,
            max_new_tokens=max_new_tokens,
            prompts=prompts,
            session=session,
            progress=progress,
        )
        done = {keys[index]: episode for index, episode in zip(chunk, ran, strict=True)}
        episodes |= done
        if journal is not None:
            head = {"arm": arm.name, "model": model.name}
            append_jsonl(journal, *({"key": key, **head, **episode.to_row()} for key, episode in done.items()))
    return [episodes[key] for key in keys]


def possible_arms(arms: Sequence[Arm], models: Mapping[str, Any], record: Record) -> tuple[list[Arm], dict[str, str]]:
    """The arms that a model's chat template can say, and of the others the reason; tried on one task before any runs.

    Args:
        models: by the names that arms call them.
    """
    possible: list[Arm] = []
    impossible: dict[str, str] = {}
    for arm in arms:
        model = models[arm.model]
        try:
            model.render(record.prompt())
            bare = True
        except UserError:
            bare = False  # a task that cannot be rendered says nothing about the arm
        try:
            model.render(arm.apply(record.prompt()))
            possible.append(arm)
        except UserError as error:
            if bare:
                impossible[arm.name] = str(error).partition(": ")[2] or str(error)
            else:
                possible.append(arm)
    return possible, impossible


def missing_episodes(episodes: Mapping[str, Sequence[Episode]]) -> dict[str, dict[str, str]]:
    """Arm → task → why it has no outcome; arms without any are left out."""
    lost = {name: {e.id: e.missing for e in ran if e.missing is not None} for name, ran in episodes.items()}
    return {name: reasons for name, reasons in lost.items() if reasons}


def check_some_ran(episodes: Mapping[str, Sequence[Episode]]) -> None:
    """A run in which no task of any arm has an outcome says nothing.

    Raises:
        UserError: with the reason of the first one.
    """
    every = [episode for ran in episodes.values() for episode in ran]
    if every and all(episode.missing is not None for episode in every):
        raise UserError(f"no task has an outcome; {every[0].id}: {every[0].missing}")


def rates(episodes: Sequence[Episode]) -> Rates:
    """Rates with Wilson intervals by label and judge; labels without episodes are left out.

    ``refusal_rate`` and ``invalid_rate`` for every label, ``attack_success_rate`` on harmful tasks,
    ``success_rate`` on the others. Success needs the environment's rule and no refusal by that judge; a task
    that no rule can judge, or that could not be run, is missing, never a failure or a refusal.
    """
    out: Rates = {}
    for label in LABELS:
        mine = [episode for episode in episodes if episode.label == label]
        if mine:
            out[label] = {
                mode: {name: rate(values).to_dict() for name, values in _flags(mine, label, mode).items()}
                for mode in MODES
            }
    return out


def compare(episodes: Sequence[Episode], reference: Sequence[Episode]) -> Rates:
    """Paired differences of every rate, ``episodes`` minus ``reference``, on the same tasks in the same order.

    Each has a bootstrap interval over tasks and ``p_value``, the exact McNemar test (two-sided).
    """
    if [episode.id for episode in episodes] != [episode.id for episode in reference]:
        raise UserError("compare: the two arms ran different tasks; run both on the same records")
    out: Rates = {}
    for label in LABELS:
        ours, theirs = ([episode for episode in each if episode.label == label] for each in (episodes, reference))
        if not ours:
            continue
        out[label] = {}
        for mode in MODES:
            first, second = _flags(ours, label, mode), _flags(theirs, label, mode)
            out[label][mode] = {
                name: paired_difference(_numbers(first[name]), _numbers(second[name])).to_dict()
                | {"p_value": _mcnemar(first[name], second[name])}
                for name in first
            }
    return out


def _flags(episodes: Sequence[Episode], label: str, mode: str) -> dict[str, list[bool | None]]:
    outcomes = [None if episode.missing is not None else episode.outcome(mode) for episode in episodes]
    success = [
        None if episode.success is None else episode.success and outcome != "refused"
        for episode, outcome in zip(episodes, outcomes, strict=True)
    ]
    return {
        "refusal_rate": [None if outcome is None else outcome == "refused" for outcome in outcomes],
        "attack_success_rate" if label == "harmful" else "success_rate": success,
        "invalid_rate": [None if outcome is None else outcome == "invalid" for outcome in outcomes],
    }


def _numbers(flags: Sequence[bool | None]) -> list[float | None]:
    return [None if flag is None else float(flag) for flag in flags]


def _mcnemar(first: Sequence[bool | None], second: Sequence[bool | None]) -> float | None:
    """Two-sided exact test on the discordant pairs; ``None`` where no pair is complete."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    up, down = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    n, few = up + down, min(up, down)
    return min(1.0, 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n)
