"""`pingscope search`: the prefix search with its generator, its evidence on unseen tasks, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from pingscope.experiments.agents.rollout import AnyAction, Episode
from pingscope.experiments.cli.checks import disjoint, needs_labels
from pingscope.experiments.cli.endings import unread_line
from pingscope.experiments.cli.options import SearchOptions
from pingscope.experiments.cli.shared import (
    Episodes,
    Reader,
    admit_probes,
    load_probes,
    open_model,
    open_run,
    settled,
    write_results,
)
from pingscope.experiments.cli.tables import behaviour_table, percent, print_table, print_texts, said_missing, signed
from pingscope.experiments.run.identity import model_identity
from pingscope.experiments.run.progress import bar, hide_weight_bars
from pingscope.experiments.studies.config import Bounds
from pingscope.experiments.studies.search.bounds import prefix_bounds
from pingscope.experiments.studies.search.held_out import held_out_study
from pingscope.experiments.studies.search.prefix_search import search_prefix, search_section
from pingscope.experiments.studies.search.prefix_table import Budget, Perf
from pingscope.experiments.studies.search.screening import Screen
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import environment_for
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.steering.generators import ANSWER_TOKENS, TEMPERATURE, ModelGenerator, endpoint_ask, kept, local_ask
from pingscope.steering.injection import Arm
from pingscope.steering.phrases import PhraseGenerator, Style
from pingscope.steering.ping import PRESETS, Candidate, Generate, SearchResult, Settings


def search(options: SearchOptions) -> None:
    published = PRESETS.get(options.preset)
    read, seed, perf, out = Reader(options.skip_bad), options.seed, options.perf, options.out
    settings = Settings(options.k, options.candidates, options.rounds, options.tau)
    records = read(options.tasks, 0 if published else options.limit)
    if published:
        settings, records = published.settings, paper_tasks(records, published.harmful, published.benign)
    unseen = read(options.held_out, options.limit, seed) if options.held_out else []
    check_tasks(options, records, unseen)
    check_generator(options.generator)
    known = load_probes(options.probes) if options.probes is not None else None
    run = open_run(options)
    journal = out / "generator.jsonl"
    style: Style = options.style if not published else "comment" if published.comment else "bare"
    proposing = make_generator(options.generator, options.base_url, style, options.per_minute, journal)
    budget = Budget(options.max_generations, options.max_minutes)
    screen = Screen() if options.screening else None
    model = open_model(options)
    notes: list[str] = []
    if known is not None and options.probes is not None:
        notes = admit_probes(known, model, options.probes, options.transfer)
    best = [0.0]

    def shown(candidate: Candidate) -> None:
        if candidate.score.complete:
            best[0] = max(best[0], candidate.score.overall)
        advance(info=f"overall {candidate.score.overall:.2f}, best {best[0]:.2f}")

    with bar("search", settings.M * settings.T) as advance:
        found = search_prefix(
            model, records, environment_for, journal=out / "search.jsonl", generator=proposing, settings=settings,
            perf=perf, seed=seed, max_turns=options.max_turns, max_new_tokens=options.max_new_tokens, screen=screen,
            probes=known, budget=budget, progress=shown,
        )  # fmt: skip
    if isinstance(proposing, ModelGenerator) and not proposing.usable:
        raise UserError(f"--generator {options.generator}: {proposing.account()}")
    atomic_write(out / "prefix.txt", found.best.text)
    print_candidates(found, skipped=read.skipped)
    for line in spent_lines(found, proposing):
        typer.echo(line)
    section = search_section(found, settings, perf, options.generator, proposing)
    play = Episodes(out, options.max_turns, options.max_new_tokens)
    if unseen:
        section["held_out"] = held_out_study(found, model, unseen, records, partial(play, model), perf)
        print_held_out(section["held_out"], read.skipped)
    sections: dict[str, Any] = {"search": section}
    models = {"agent": model}
    if options.bounds:
        sections["bounds"] = measured_bounds(options, models, records, unseen, found.best.text, play)
    missing = play.missing | ({"search": section["missing"]} if "missing" in section else {})
    said_missing({}, missing)
    write_results(
        run, models, sections, limits=notes, ending=_ending(found, section, perf),
        hint=_hint(found), skipped=read.skipped,
        missing=missing,
    )  # fmt: skip


def measured_bounds(
    options: SearchOptions,
    models: dict[str, HookedModel],
    records: Sequence[Record],
    unseen: Sequence[Record],
    searched: str,
    play: Episodes,
) -> dict[str, Any]:
    """Both bounds beside the search; the base, where one is given, joins ``models`` in front of the agent."""
    agent = models["agent"]
    base = open_model(options, options.base, dtype=settled(options, agent)) if options.base else None
    if base is not None:
        models.clear()
        models |= {"base": base, "agent": agent}
    sizes = Bounds(soft_tokens=options.soft_tokens, coordinate_steps=options.coordinate_steps)

    def evaluate(arm: Arm, tasks: Sequence[Record]) -> list[Episode]:
        return play(models[arm.model], arm, tasks)

    with bar("bounds", sizes.soft_steps + sizes.coordinate_steps) as advance:
        section = prefix_bounds(
            agent, records, deduplicate(list(unseen), list(records)), environment_for, evaluate, searched=searched,
            sizes=sizes, folder=options.out, base=base, seed=options.seed,
            progress=lambda which, loss: advance(info=f"{which} {loss:.2f}"),
        )  # fmt: skip
    behaviour_table(section["behaviour"])
    print_texts(section["texts"])
    typer.echo(f"bounds: {section['sentence']}")
    return section


def _hint(found: SearchResult) -> str:
    counts = found.best.score.counts
    n = counts["n_harmful"] + counts["n_benign"]
    return unread_line("the agent behind the best prefix", round((counts["invalid"] or 0) * n), n)


def check_tasks(options: SearchOptions, records: Sequence[Record], unseen: Sequence[Record]) -> None:
    """Both labels on both sides, no task on both, and a budget that pays for one candidate at least."""
    needs_labels("--tasks", options.tasks, records)
    if options.held_out:
        needs_labels("--held-out", options.held_out, unseen)
        disjoint({"--tasks": (options.tasks, records), "--held-out": (options.held_out, unseen)})
    if options.bounds and not options.held_out:
        raise UserError("--bounds: trained on --tasks and measured on other ones; add --held-out TASKS")
    others = [record for record in records if record.label != "harmful"]
    if options.perf == "success" and all(type(environment_for(record)) is AnyAction for record in others):
        raise UserError(
            f"--perf success: no benign task of --tasks {options.tasks} has a rule of success (field evaluator); use "
            "--perf not_refused"
        )
    cost = len(records) * options.max_turns
    if 0 < options.max_generations < cost:
        raise UserError(
            f"--max-generations {options.max_generations}: one candidate takes up to {cost} answers ({len(records)} "
            f"tasks x {options.max_turns} turns); give at least that, or fewer tasks (--limit)"
        )


def _ending(found: SearchResult, section: dict[str, Any], perf: Perf) -> str:
    best, name = found.best.score, "carried out" if perf == "success" else "not refused"
    n, other = best.counts["n_harmful"], best.counts["n_benign"]
    text = (
        f"The best of {len(found.candidates)} prefixes refuses {round(best.refusal * n)} of {n} harmful tasks and "
        f"leaves {100 * best.perf:.0f}% of {other} others {name}"
    )
    held = section.get("held_out")
    if not held:
        return text + ", on the tasks it was chosen on."
    overall = held["selection_bias"]["held_out"]["value"]
    return f"{text}; its overall score on {held['n']} tasks never searched is {overall:.2f}."


def paper_tasks(records: Sequence[Record], harmful: int, benign: int) -> list[Record]:
    """The first tasks of each kind, as many as the published search used."""
    chosen = []
    for label, n in (("harmful", harmful), ("benign", benign)):
        mine = [record for record in records if record.label == label][:n]
        if len(mine) < n:
            raise UserError(f"--preset: needs {n} {label} tasks and --tasks has {len(mine)}; add some")
        chosen += mine
    return chosen


def check_generator(spec: str) -> None:
    kind, _, name = spec.partition(":")
    if spec != "phrases" and not (kind in ("hf", "openai") and name):
        raise UserError(f"--generator {spec!r}: unknown; use phrases, hf:PATH or openai:MODEL (with --base-url)")


def make_generator(
    spec: str,
    base_url: str = "",
    style: Style = "comment",
    per_minute: float = 0.0,
    journal: Path | None = None,
) -> Generate:
    """``phrases`` (built in), ``hf:PATH`` (a local chat model), ``openai:MODEL`` (an endpoint).

    Answers of models are kept in ``journal``: a search that starts again proposes the same prefixes.
    """
    check_generator(spec)
    kind, _, name = spec.partition(":")
    if kind == "phrases":
        return PhraseGenerator(style=style)
    if kind == "hf":
        hide_weight_bars()
        model = load_model(name)
        if not model.tokenizer.chat_template:
            raise UserError(f"--generator {spec}: its tokenizer has no chat template; choose a chat model")
        ask, source = local_ask(model), [model_identity(model), str(TEMPERATURE), str(ANSWER_TOKENS)]
    else:
        ask, source = endpoint_ask(name, base_url or None, per_minute=per_minute), [spec, base_url]
    return ModelGenerator(kept(ask, journal, source) if journal else ask, comment=style == "comment")


COLUMNS = {  # what a candidate's counts call it → what the tables of other commands do
    "refusal": "harmful refused",
    "attack_success": "harmful done",
    "success": "benign done",
    "invalid": "invalid",
    "not_refused": "benign not refused",
}


def print_candidates(found: SearchResult, n: int = 5, skipped: int = 0) -> None:
    """The best candidates: refusal beside what it costs, so that one that only breaks the agent is seen as such."""
    rows = []
    for rank, candidate in enumerate(found.candidates[:n], 1):
        score = candidate.score
        shares = {"refusal": score.refusal} | score.counts
        cells = [percent({"value": shares[name], "ci": score.counts["ci"][name] or (None, None)}) for name in COLUMNS]
        n_tasks = f"{score.counts['n_harmful']}/{score.counts['n_benign']}"
        rows.append([str(rank), *cells, f"{score.overall:.2f}", n_tasks])
    print_table(
        ["", *COLUMNS.values(), "overall", "n"], rows,
        "per cent [95% interval], n: harmful/others; on the tasks searched, which flatter the winner: measure it on "
        "others (--held-out)", skipped,
    )  # fmt: skip
    print_texts({str(rank): candidate.text for rank, candidate in enumerate(found.candidates[:n], 1)})


def spent_lines(found: SearchResult, proposing: Any = None) -> list[str]:
    """The cost of a search in words, and whether its shortcuts held."""
    notes = found.notes
    lines = [f"spent: {notes['generations']} generations, {notes['generated_tokens']} tokens"]
    if notes["stopped_by_budget"]:
        lines[0] += "; the budget ended the search"
    if screening := notes.get("screening"):
        rank, dropped = screening["spearman"], screening["dropped"]
        value = "too few scores" if rank["value"] is None else f"{signed(rank)}, n = {rank['n']}"
        verdict = "trusted" if screening["trusted"] else "not trusted: every candidate was raced"
        lines.append(f"cheap score against the true one: Spearman {value} ({verdict})")
        lines.append(
            f"dropped: {dropped['by the cheap score']} by the cheap score, {dropped['in a race']} in a race "
            f"(each with at most {100 * screening['delta']:.0f}% chance of being better than the best)"
        )
    if isinstance(proposing, ModelGenerator):
        lines.append(f"generator: {proposing.account()}")
    return lines


def print_held_out(held: dict[str, Any], skipped: int = 0) -> None:
    behaviour_table(held["behaviour"], skipped=skipped)
    rows = [[name, signed(cell).lstrip("+")] for name, cell in held["overall"].items()]
    print_table(["arm", "overall"], rows, f"{held['n']} tasks that the search never saw [95% interval]", skipped)
    print_texts({name: text for name, text in held["texts"].items() if text})
    bias = held["selection_bias"]
    low, high = bias["ci"]
    typer.echo(
        f"selection bias: {bias['search']:.2f} on the tasks searched, {bias['held_out']['value']:.2f} on others: "
        f"{bias['bias']:+.2f} [{low:+.2f}, {high:+.2f}]"
    )
