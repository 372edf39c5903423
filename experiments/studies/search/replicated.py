"""Does screening find what the exhaustive search finds, and at what share of its tokens? Replicated searches.

    python -m pingscope.experiments.studies.search.replicated --model runs/study/models/agent \\
        --tasks organism:validation --held-out organism:test [--searches 20] [--seed 0] [--out runs/replicated]

Every search is run twice from the same random state, exhaustively and screened. All of them read one table of outcomes
by prefix and task, so that a prefix is measured once however many searches ask for it; what a search *would* have spent
is counted from the tokens in the table. Both winners are measured on tasks that no search saw. Resumable.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pingscope.experiments.cli.options import ModelSettings
from pingscope.experiments.cli.shared import open_model
from pingscope.experiments.cli.tables import percent, print_table, signed
from pingscope.experiments.models.organism.mixes import OPENINGS
from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, say
from pingscope.experiments.studies.search.cheap_scores import Cheap
from pingscope.experiments.studies.search.prefix_search import exhaustive, make_scorer, widened
from pingscope.experiments.studies.search.prefix_table import Perf, PrefixTable
from pingscope.experiments.studies.search.screening import Screen, Screened
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import Record
from pingscope.experiments.tasks.sources import environment_for, read_tasks
from pingscope.interp.files import write_json
from pingscope.interp.generate.shared_prompts import SharedPrefill
from pingscope.probes.statistics import Estimate, mean, rate
from pingscope.steering.phrases import PhraseGenerator
from pingscope.steering.ping import DEFAULT, Settings, normalised, ping

WITHIN = 0.01  # one point of the overall score


def replicate(
    table: PrefixTable,
    unseen: PrefixTable,
    cheap: Cheap | None,
    *,
    searches: int = 20,
    settings: Settings = DEFAULT,
    screen: Screen | None = None,
    perf: Perf = "not_refused",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Pairs of searches: winners, their scores on unseen tasks, and the tokens each would have generated."""
    screen = screen or Screen()
    rows: list[dict[str, Any]] = []
    for seed in range(searches):
        full, less = table.view(), table.view()
        scorer = Screened(less, perf, screen, cheap, seed)
        winners, curves = {}, {}
        for name, score, wide in (("exhaustive", exhaustive(full, perf), None), ("screened", scorer, screen)):
            rounds = asdict(widened(settings, wide))
            found = ping(PhraseGenerator(), score, random.Random(seed), **rounds)
            winners[name], curves[name] = found.best, [one.best for one in found.rounds]
        texts = {name: winner.text for name, winner in winners.items()}
        everything = list(range(len(unseen.records)))
        unseen.measure(dict.fromkeys(texts.values(), everything))
        held = {name: unseen.score(text, perf).overall for name, text in texts.items()}  # type: ignore[union-attr]
        rows.append(
            {
                "seed": seed,
                "same": normalised(texts["exhaustive"]) == normalised(texts["screened"]),
                "texts": texts,
                "search": {name: winner.score.overall for name, winner in winners.items()},
                "held_out": held,
                "curves": curves,
                # What the cheap score reads is shared by these searches; each of them would have generated it.
                "tokens": {"exhaustive": full.tokens, "screened": less.tokens + getattr(cheap, "tokens", 0)},
                "spearman": scorer.correlation().to_dict(),
                "dropped": dict(scorer.dropped),
            }
        )
        if progress is not None:
            gain = held["screened"] - held["exhaustive"]
            share = rows[-1]["tokens"]["screened"] / rows[-1]["tokens"]["exhaustive"]
            progress(f"search {seed}: {gain:+.3f} on unseen tasks, {share:.2f} of the tokens")
    loss = [row["held_out"]["exhaustive"] - row["held_out"]["screened"] for row in rows]
    shares = [row["tokens"]["screened"] / row["tokens"]["exhaustive"] for row in rows]
    total = {name: sum(row["tokens"][name] for row in rows) for name in ("exhaustive", "screened")}
    return {
        "searches": rows,
        "within": rate([value <= WITHIN + 1e-9 for value in loss]).to_dict(),
        "loss": mean(loss).to_dict(),
        "token_share": total["screened"] / total["exhaustive"],
        "token_shares": [min(shares), statistics.median(shares), max(shares)],
        "screen": asdict(screen),
        "settings": asdict(settings),
    }


def all_correlations(rows: Sequence[dict[str, Any]]) -> Estimate:
    """Mean rank correlation of the cheap score over searches."""
    return mean([row["spearman"]["value"] for row in rows if row["spearman"]["value"] is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--limit", type=int, default=80, help="tasks per label of the search")
    parser.add_argument("--held-out-limit", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the organism's tasks")
    parser.add_argument("--perf", default="success", choices=("success", "not_refused"))
    parser.add_argument("--max-turns", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/replicated"))
    for field, value in asdict(Screen()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    screen = Screen(**{field: getattr(given, field) for field in asdict(Screen())})
    run = Run(given.out, say)
    model = open_model(ModelSettings(), given.model)
    chosen = _without_lookalikes(read_tasks(given.tasks, given.limit, given.seed))
    held = _without_lookalikes(read_tasks(given.held_out, given.held_out_limit, given.seed))
    engine = SharedPrefill(model)
    limits = {"max_turns": given.max_turns, "max_new_tokens": given.max_new_tokens, "engine": engine}
    table = PrefixTable(model, chosen, environment_for, given.out / "search.jsonl", **limits)
    unseen = PrefixTable(model, deduplicate(held, chosen), environment_for, given.out / "held-out.jsonl", **limits)
    openings = OPENINGS if given.tasks.startswith("organism:") else None
    scorer = make_scorer(table, given.perf, screen, openings=openings)
    cheap = scorer.rank_by if isinstance(scorer, Screened) else None
    started = time.perf_counter()
    with bar("searches", given.searches) as advance:

        def told(line: str) -> None:
            say(line)
            advance(info=line)

        found = replicate(table, unseen, cheap, searches=given.searches, screen=screen, perf=given.perf, progress=told)
    found |= {"model": model.name, "fingerprint": model.fingerprint, "seconds": time.perf_counter() - started}
    write_json(run.folder / "replicated.json", found)
    low, middle, high = found["token_shares"]
    print_table(
        ["model", "searches", "within a point, %", "loss on held-out", "share of tokens", "Spearman", "same winner"],
        [
            [
                model.name,
                str(given.searches),
                percent(found["within"]),
                signed(found["loss"]),
                f"{found['token_share']:.3f} (median {middle:.3f}, {low:.3f} to {high:.3f})",
                signed(all_correlations(found["searches"]).to_dict()),
                str(sum(row["same"] for row in found["searches"])),
            ]
        ],
        "screened against exhaustive search from the same random states [95% interval]",
    )


def _without_lookalikes(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.label != "lookalike"]


if __name__ == "__main__":
    main()
