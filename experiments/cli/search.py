"""`pingscope search`: the prefix search with its generator, its evidence on unseen tasks, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from pingscope.experiments.cli.shared import Episodes, check_width, open_model, write_results
from pingscope.experiments.cli.tables import print_table, signed
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.identity import model_identity
from pingscope.experiments.run.progress import bar, hide_weight_bars, say
from pingscope.experiments.studies.search.held_out import held_out_study
from pingscope.experiments.studies.search.prefix_search import search_prefix, search_section
from pingscope.experiments.studies.search.prefix_table import Budget, Perf
from pingscope.experiments.studies.search.screening import Screen
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write
from pingscope.interp.loading import load_model
from pingscope.steering.generators import ModelGenerator, endpoint_ask, kept, local_ask
from pingscope.steering.phrases import PhraseGenerator
from pingscope.steering.ping import PRESETS, Candidate, Generate, SearchResult, Settings


def search_job(
    model_name: str,
    tasks: str,
    out: Path,
    settings: Settings,
    *,
    preset: str = "",
    perf: Perf = "not_refused",
    generator: str = "phrases",
    base_url: str = "",
    per_minute: float = 0.0,
    screening: bool = False,
    probes: Path | None = None,
    max_generations: int = 0,
    max_minutes: float = 0.0,
    held_out: str = "",
    limit: int = 0,
    max_turns: int = 5,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: Path | None = None,
) -> None:
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset!r}: unknown; use one of {', '.join(PRESETS)}")
    published = PRESETS.get(preset)
    records = read_tasks(tasks, 0 if published else limit)
    if published:
        settings, records = published.settings, paper_tasks(records, published.harmful, published.benign)
    unseen = read_tasks(held_out, limit, seed) if held_out else []
    comment = published.comment if published else True
    proposing = make_generator(generator, base_url, comment, per_minute, out / "generator.jsonl")
    budget = Budget(max_generations, max_minutes)
    screen = Screen() if screening else None
    run = Run(out, say)
    model = open_model(model_name, chat_template)
    known = None
    if probes is not None:
        from pingscope.probes.logistic import LayerProbes

        known = LayerProbes.load(probes)
        check_width(known, model, probes)
    best = [0.0]

    def shown(candidate: Candidate) -> None:
        if candidate.score.complete:
            best[0] = max(best[0], candidate.score.overall)
        advance(info=f"overall {candidate.score.overall:.2f}, best {best[0]:.2f}")

    with bar("search", settings.M * settings.T) as advance:
        found = search_prefix(
            model, records, environment_for, journal=out / "search.jsonl", generator=proposing, settings=settings,
            perf=perf, seed=seed, max_turns=max_turns, max_new_tokens=max_new_tokens, screen=screen, probes=known,
            budget=budget, progress=shown,
        )  # fmt: skip
    atomic_write(out / "prefix.txt", found.best.text)
    print_candidates(found)
    for line in spent_lines(found, proposing):
        typer.echo(line)
    section = search_section(found, settings, perf, str(generator), proposing)
    if unseen:
        evaluate = partial(Episodes(out, max_turns, max_new_tokens), model)
        section["held_out"] = held_out_study(found, model, unseen, records, evaluate, perf)
        print_held_out(section["held_out"])
    write_results(run, model, {"search": section})


def paper_tasks(records: Sequence[Record], harmful: int, benign: int) -> list[Record]:
    """The first tasks of each kind, as many as the published search used."""
    chosen = []
    for label, n in (("harmful", harmful), ("benign", benign)):
        mine = [record for record in records if record.label == label][:n]
        if len(mine) < n:
            raise UserError(f"--preset: needs {n} {label} tasks and --tasks has {len(mine)}; add some")
        chosen += mine
    return chosen


def make_generator(
    spec: str,
    base_url: str = "",
    comment: bool = True,
    per_minute: float = 0.0,
    journal: Path | None = None,
) -> Generate:
    """``phrases`` (built in), ``hf:PATH`` (a local chat model), ``openai:MODEL`` (an endpoint).

    Answers of models are kept in ``journal``: a search that starts again proposes the same prefixes.
    """
    kind, _, name = spec.partition(":")
    if kind == "phrases" and not name:
        return PhraseGenerator(comment=comment)
    if kind == "hf" and name:
        hide_weight_bars()
        model = load_model(name)
        if not model.tokenizer.chat_template:
            raise UserError(f"--generator {spec}: its tokenizer has no chat template; choose a chat model")
        ask, source = local_ask(model), [model_identity(model)]
    elif kind == "openai" and name:
        ask, source = endpoint_ask(name, base_url or None, per_minute=per_minute), [spec, base_url]
    else:
        raise UserError(f"--generator {spec!r}: unknown; use phrases, hf:PATH or openai:MODEL (with --base-url)")
    return ModelGenerator(kept(ask, journal, source) if journal else ask, comment=comment)


def print_candidates(found: SearchResult, n: int = 5) -> None:
    rows = []
    for candidate in found.candidates[:n]:
        counts, score = candidate.score.counts, candidate.score
        perf = "success" if counts["success"] == score.perf != counts["not_refused"] else "not_refused"
        cells = [_interval(score.perf, counts["ci"][perf]), _interval(score.refusal, counts["ci"]["refusal"])]
        n_tasks = counts["n_harmful"] + counts["n_benign"]
        rows.append([candidate.text.strip(), str(candidate.round), f"{score.overall:.3f}", *cells, str(n_tasks)])
    print_table(
        ["prefix", "round", "overall", "perf", "refusal", "tasks"], rows,
        "[95% interval]; on the tasks searched, which flatter the winner: measure it on others (--held-out)",
    )  # fmt: skip


def _interval(value: float, ci: Sequence[float] | None) -> str:
    return f"{value:.2f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")


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


def print_held_out(held: dict[str, Any]) -> None:
    rows = []
    for name, cell in held["overall"].items():
        text = (held["texts"].get(name) or "").strip()
        rows.append([name, signed(cell).lstrip("+"), text if len(text) < 70 else text[:67] + "…"])
    print_table(["arm", "overall", "text"], rows, f"{held['n']} tasks that the search never saw [95% interval]")
    bias = held["selection_bias"]
    low, high = bias["ci"]
    typer.echo(
        f"selection bias: {bias['search']:.2f} on the tasks searched, {bias['held_out']['value']:.2f} on others: "
        f"{bias['bias']:+.2f} [{low:+.2f}, {high:+.2f}]"
    )
