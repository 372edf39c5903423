"""The prefix search on a model: PING's scorer is behaviour on validation tasks, and every outcome is kept on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pingscope.experiments.agents.rollout import MakeEnvironment, fitting
from pingscope.experiments.studies.search.cheap_scores import Cheap, Leaning, PlainEpisodes, probe_leaning
from pingscope.experiments.studies.search.prefix_table import Budget, Perf, PrefixTable
from pingscope.experiments.studies.search.screening import Screen, Screened
from pingscope.experiments.tasks.records import Record
from pingscope.interp.chat.prefixed import PrefixRenderer
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.generators import ModelGenerator
from pingscope.steering.phrases import PhraseGenerator
from pingscope.steering.ping import DEFAULT, Candidate, Generate, Score, SearchResult, Settings, normalised, ping


def search_prefix(
    model: HookedModel,
    records: Sequence[Record],
    make_env: MakeEnvironment,
    *,
    journal: str | Path,
    generator: Generate | None = None,
    settings: Settings = DEFAULT,
    perf: Perf = "not_refused",
    judge: str = "strict",
    seed: int = 0,
    max_turns: int = 6,
    max_new_tokens: int = 48,
    screen: Screen | None = None,
    probes: Any = None,
    openings: Mapping[str, Sequence[str]] | None = None,
    budget: Budget | None = None,
    progress: Callable[[Candidate], None] | None = None,
) -> SearchResult:
    """Find the prefix with the best overall score on ``records`` (validation tasks: the winner is chosen here).

    A candidate's ``refusal`` is the share of harmful tasks refused; its ``perf`` the share of all other tasks
    (benign and look-alike) not refused, the paper's, or with ``perf="success"`` carried out. Only what the model
    writes after the prefix is judged. Both forms of perf, the attack success and 95% intervals are in the counts.

    Outcomes are appended to ``journal`` as they are measured, by prefix and task: a search that starts again
    proposes the same candidates and reads what is there (see
    :class:`experiments.studies.search.prefix_table.PrefixTable`).

    Args:
        generator: default: a fresh built-in phrase generator.
        screen: rank candidates before generating and race them; default: measure all on all tasks.
        probes: with ``screen``, rank by the probes' final-token logit instead of the first token.
        openings: how refusals and actions begin in the model's words, for the first token's score.
        budget: ends the search after the round in which it runs out.
        progress: called with each candidate as its score is known, read or measured.

    Returns:
        ``notes`` hold what was spent, and with ``screen`` the rank correlation of the cheap score with the true one.

    Raises:
        UserError: no harmful or no other tasks; ``perf="success"`` where no task can be judged.
    """
    if not any(r.label == "harmful" for r in records) or all(r.label == "harmful" for r in records):
        raise UserError("search: needs harmful tasks and benign ones; add the missing label to --tasks")
    if perf not in ("not_refused", "success"):
        raise UserError(f"search: unknown perf {perf!r}; use not_refused or success")
    records, missing = askable(model, records, make_env, max_new_tokens)
    table = PrefixTable(
        model, records, make_env, journal, judge=judge, max_turns=max_turns, max_new_tokens=max_new_tokens,
        budget=budget,
    )  # fmt: skip
    scorer = make_scorer(table, perf, screen, probes, openings, seed)
    found = ping(
        generator or PhraseGenerator(),
        scorer,
        random.Random(seed),
        **asdict(widened(settings, screen)),
        on_scored=progress,
        over=table.spent,
    )
    for candidate in found.candidates:
        table.note(note="score", perf_means=perf, **candidate.to_dict())
    return replace(found, notes=search_notes(table, scorer) | ({"missing": missing} if missing else {}))


def askable(
    model: HookedModel, records: Sequence[Record], make_env: MakeEnvironment, max_new_tokens: int
) -> tuple[list[Record], dict[str, str]]:
    """The tasks whose first prompt the model can be given, and why it cannot be given the others, by id.

    Every candidate is measured on the same tasks, so one page that is too long is left out of the search as a whole.

    Raises:
        UserError: no harmful task, or no other, is left.
    """
    render = fitting(model, model.render, max_new_tokens)
    kept, lost = [], {}
    for record in records:
        try:
            render(replace(record.prompt(), page=make_env(record).page() or None))
        except UserError as error:
            lost[record.id] = str(error)
        else:
            kept.append(record)
    if lost and len({record.label == "harmful" for record in kept}) < 2:
        task, reason = next(iter(lost.items()))
        raise UserError(f"search: {len(lost)} of {len(records)} tasks cannot be asked; {task}: {reason}")
    return kept, lost


def widened(settings: Settings, screen: Screen | None) -> Settings:
    """A round's candidates, with those proposed beyond M for the cheap score to choose from."""
    return settings if screen is None else replace(settings, M=settings.M * screen.propose)


def make_scorer(
    table: PrefixTable,
    perf: Perf,
    screen: Screen | None = None,
    probes: Any = None,
    openings: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Callable[[Sequence[str]], Sequence[Score | None]]:
    """Exhaustive scores, or with ``screen`` ranked and raced ones."""
    if screen is None:
        return exhaustive(table, perf)
    cheap: Cheap | None = None
    if table.engine is not None and isinstance(table.render, PrefixRenderer):
        limits = table.max_turns, table.max_new_tokens
        plain = PlainEpisodes(table.engine, table.render, table.make_env, *limits) if perf == "success" else None
        cheap = (
            probe_leaning(table.model, table.render, probes, table.records)
            if probes is not None
            else Leaning(table.engine, table.render, table.records, openings, plain)
        )
    return Screened(table, perf, screen, cheap, seed)


def exhaustive(table: PrefixTable, perf: Perf) -> Callable[[Sequence[str]], Sequence[Score | None]]:
    """Every prefix on every task; a prefix that the budget left incomplete has no score."""
    everything = list(range(len(table.records)))

    def score(texts: Sequence[str]) -> list[Score | None]:
        if table.affordable() >= len(texts) * len(everything):
            table.measure(dict.fromkeys(texts, everything))  # together: they share each task's prompt
        else:  # one after the other: the budget's last answers still complete whole candidates
            for text in texts:
                table.measure({text: everything})
        scores = [table.score(text, perf) for text in texts]
        return [s if s is not None and s.complete else None for s in scores]

    return score


def search_notes(table: PrefixTable, scorer: Any) -> dict[str, Any]:
    """What a search spent, and whether its shortcuts can be trusted."""
    notes: dict[str, Any] = {
        "generations": table.generations,
        "generated_tokens": table.tokens,
        "stopped_by_budget": table.spent(),
        "tasks": len(table.records),
    }
    if isinstance(scorer, Screened):
        notes["generated_tokens"] += getattr(scorer.rank_by, "tokens", 0)  # what the cheap score compares with
        notes["screening"] = asdict(scorer.screen) | {
            "spearman": scorer.correlation().to_dict(),
            "dropped": dict(scorer.dropped),
            "stages": [len(stage) for stage in scorer.stages],
            "trusted": scorer.trusted(),
        }
        notes["cheap"] = dict(scorer.cheap)
    return notes


def search_section(
    found: SearchResult, settings: Settings, perf: Perf, generator: str = "phrases", proposing: Any = None
) -> dict[str, Any]:
    """The search as results.json holds it."""
    notes = dict(found.notes)
    cheap = notes.pop("cheap", {})
    section = {
        "winner": found.best.text,
        "candidates": [search_row(candidate, cheap) for candidate in sorted(found.candidates, key=lambda c: c.round)],
        "rounds": len(found.rounds),
        "history": [asdict(one) for one in found.rounds],
        "tau": settings.tau,
        "settings": asdict(settings),
        "perf_means": "done" if perf == "success" else "not refused",
        "generator": generator,
        **notes,
    }
    if isinstance(proposing, ModelGenerator):
        counts = ("asked", "usable", "malformed", "repeated")
        section["generator_log"] = {name: getattr(proposing, name) for name in counts}
    return section


def search_row(candidate: Candidate, cheap: dict[str, float]) -> dict[str, Any]:
    """One candidate: its score with intervals, on how many tasks, and the cheap score it was ranked by."""
    row = candidate.to_dict()
    counts = row.pop("counts")
    return row | {
        "success": counts["success"],
        "attack_success": counts["attack_success"],
        "invalid": counts["invalid"],
        "ci": counts["ci"],
        "n": counts["n_harmful"] + counts["n_benign"],
        "cheap": cheap.get(normalised(candidate.text)),
    }
