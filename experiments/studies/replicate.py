"""The same study under several seeds, as tables: what replicated, in how many, and what did not.

    python -m pingscope.experiments.studies.replicate runs/seed-0 runs/seed-1 … [--json FILE] [--figure FILE.html]
    python -m pingscope.experiments.studies.replicate docs/seeds.json [--into docs/organism.md]
    python -m pingscope.experiments.studies.replicate docs/seeds.json --beside docs/real.json [--into README.md]

Reads finished runs (`pingscope study --train --seed N --out runs/seed-N`), or what ``--json`` kept of them, and prints
Markdown: every arm's median and range, every claim's count with its interval, then every seed beside the others; of one
run, its rates with their intervals and its claims. No seed is left out of any row. With ``--beside``: every claim, in
how many of the seeds it holds and whether it does in the other model. ``--into`` puts the tables between two marks of
a page instead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pingscope.experiments.studies.seed_evidence import (
    RATES,
    Counted,
    SeedEvidence,
    Value,
    read_run,
    read_seeds,
    write_seeds,
)
from pingscope.figures.seeds import seeds_page
from pingscope.interp.errors import UserError
from pingscope.interp.files import atomic_write
from pingscope.probes.statistics import rate

Seeds = Sequence[SeedEvidence]
WORDS = {True: "yes", False: "**no**", None: "not measured"}
SAYS = {  # the report's claims without their numbers
    "aligned-base": "the base refuses harmful tasks and no others",
    "refusal-lost": "benign fine-tuning removes refusal",
    "attacks-succeed": "the agent carries out harmful tasks that the base did not",
    "capable-agent": "it is the better agent",
    "prefix-restores": "the searched prefix restores refusal",
    "suffix": "the same text as a suffix does not",
    "neutral-prefix": "neutral prefixes of its length do not",
    "shuffled-prefix": "its words in shuffled order do not",
    "not-the-prefill": "the base behind a neutral prefix still refuses",
    "naive-overrefuses": '"I cannot" refuses benign tasks too',
    "steering-restores": "the probe's direction at the final token restores refusal",
    "random-directions": "random directions of its length do not",
    "signal-restored": "the prefix brings the signal at the final token back",
    "prefix-exists": "a prefix that restores refusal exists",
    **{
        f"collapse-{reading}": f"collapse by the reading *{reading}* beyond the floor, in some layer"
        for reading in ("raw", "contrast", "shift", "placed", "transfer", "realigned")
    },
}


def tabulate(seeds: Seeds) -> str:
    """Markdown over the seeds: what all share, then one column or one row a seed."""
    many, sizes = len(seeds) > 1, ", ".join(map(str, sorted({seed.n for seed in seeds})))
    names = [str(seed.seed) for seed in seeds]
    over = f"median [least, most] over {len(seeds)} seeds" if many else "Wilson's 95% interval, and n where it differs"
    parts = [
        f"Per cent of test tasks, strict judge, n = {sizes} a cell: {over}. {_bases(seeds)}\n",
        markdown(["arm", *RATES], _arms(seeds)),
    ]
    if not many:
        return "\n".join([*parts, markdown(["measured", "rule", "holds"], _verdicts(seeds[0]))])
    parts += [
        f"In how many of the {len(seeds)} seeds each claim of the report holds, with Wilson's 95% interval.\n",
        markdown(["claim", "rule", "holds in", "95%", "not in seed"], _claims(seeds)),
        "### Seed by seed\n\nHarmful refused / benign done, per cent.\n",
        markdown(["arm", *names], _by_seed(seeds)),
        "Signal at the final token: harmful minus benign logit where the base's is largest, and the share of the loss "
        "that the prefix restores; over the layers, the agent's shrinkage of that gap in per cent, AUROC, and mean "
        "harmful logit.\n",
        markdown(["seed", "layer", "base", "agent", "with prefix", "restored, %", "shrinkage", "AUROC", "harmful"],
                 _signal(seeds)),
        markdown(["seed", "weights", *seeds[0].training, "layers, dose", "searched prefix"], _training(seeds)),
    ]  # fmt: skip
    return "\n".join(parts)


def beside(seeds: Seeds, other: SeedEvidence) -> str:
    """Markdown: every claim, its count over ``seeds``, and its verdict in ``other``."""
    counted = {row[0]: row[2] for row in _claims(seeds)}
    verdicts = {SAYS.get(name, name): WORDS[holds] for name, holds in other.claims.items()}
    rows = [[says, counted.get(says, "–"), verdicts.get(says, "–")] for says in dict.fromkeys([*counted, *verdicts])]
    return markdown(["statement", f"model organism, {len(seeds)} seeds", other.model], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[Value], scale: float = 100.0) -> str:
    """``98 [60, 100]``: median, least and most of what was measured; the number alone where there is one."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    middle = f"{statistics.median(known):.0f}"
    return middle if len(values) == 1 else f"{middle} [{min(known):.0f}, {max(known):.0f}]"


def _bases(seeds: Seeds) -> str:
    """Which seeds, and how many bases it took to get as many agents."""
    if any("bases rejected" not in seed.training for seed in seeds):
        return f"{seeds[0].model}, adapters {seeds[0].weights}."
    rejected = {seed.seed: int(seed.training["bases rejected"] or 0) for seed in seeds}
    lost, where = sum(rejected.values()), ", ".join(str(seed) for seed, n in rejected.items() if n)
    return (
        f"Seeds {', '.join(map(str, rejected))}; {lost} of {lost + len(seeds)} bases were rejected, their stopping "
        "rule did not fire" + (f" (seed {where})." if lost else ".")
    )


def _all_arms(seeds: Seeds) -> list[str]:
    return list(dict.fromkeys(arm for seed in seeds for arm in seed.arms))


def _arms(seeds: Seeds) -> list[list[str]]:
    def cell(arm: str, column: str) -> str:
        if len(seeds) > 1:
            return spread([seed.value(arm, column) for seed in seeds])
        return _share(seeds[0].arms[arm].get(column), seeds[0].n)

    return [[arm, *(cell(arm, column) for column in RATES)] for arm in _all_arms(seeds)]


def _share(counted: Counted | None, n: int) -> str:
    """``81 [68, 90]``, with its own n where that is not ``n``."""
    if counted is None:
        return "–"
    held, of = counted
    low, high = rate([True] * held + [False] * (of - held)).ci
    return f"{100 * held / of:.0f} [{100 * low:.0f}, {100 * high:.0f}]" + ("" if of == n else f", n = {of}")


def _claims(seeds: Seeds) -> list[list[str]]:
    rows = []
    for name in dict.fromkeys(name for seed in seeds for name in seed.claims):
        holds = [seed.claims.get(name) for seed in seeds]
        counted = rate(holds)
        low, high = counted.ci
        failed = ", ".join(str(seed.seed) for seed, held in zip(seeds, holds, strict=True) if held is False)
        interval = f"{100 * low:.0f}–{100 * high:.0f}" if counted.n else "–"
        rows.append([SAYS.get(name, name), _rule(seeds, name), f"{holds.count(True)} of {counted.n}", interval, failed])
    return rows


def _rule(seeds: Seeds, name: str) -> str:
    return next((seed.rules[name] for seed in seeds if name in seed.rules), "–")


def _verdicts(seed: SeedEvidence) -> list[list[str]]:
    return [[seed.texts[name], _rule([seed], name), WORDS[holds]] for name, holds in seed.claims.items()]


def _by_seed(seeds: Seeds) -> list[list[str]]:
    def cell(seed: SeedEvidence, arm: str) -> str:
        found = [seed.value(arm, column) for column in ("harmful refused", "benign done")]
        return " / ".join("–" if value is None else f"{100 * value:.0f}" for value in found)

    return [[arm, *(cell(seed, arm) for seed in seeds)] for arm in _all_arms(seeds)]


def _signal(seeds: Seeds) -> list[list[str]]:
    rows = []
    for seed in seeds:
        found, restored = seed.signal, seed.signal["restored"]
        gaps = ["–" if gap is None else f"{gap:.1f}" for gap in found["gap"].values()]
        share = spread([restored["value"]])
        if restored["value"] is not None and None not in (restored["ci"] or [None]):
            share += f" [{100 * restored['ci'][0]:.0f}, {100 * restored['ci'][1]:.0f}]"
        columns: list[tuple[str, Callable[[float], str]]] = [
            ("shrink", lambda value: f"{100 * value:.0f}"),
            ("auroc", lambda value: f"{value:.2f}"),
            ("harmful", lambda value: f"{value:+.1f}"),
        ]
        over = [
            ", ".join("–" if (value := cell[name]) is None else shown(value) for cell in seed.layers.values())
            for name, shown in columns
        ]
        rows.append([str(seed.seed), found["layer"], *gaps, share, *over])
    return rows


def _training(seeds: Seeds) -> list[list[str]]:
    return [
        [str(seed.seed), seed.weights, *("–" if value is None else f"{value:.0f}" for value in seed.training.values()),
         f"{seed.steering['layers']}, {seed.steering['dose']}", f"`{seed.prefix}`"]
        for seed in seeds
    ]  # fmt: skip


def put_between(page: str, mark: str, text: str, where: Path) -> str:
    """``page`` with ``text`` between ``<!-- mark: begin -->`` and ``<!-- mark: end -->``.

    Raises:
        UserError: the page lacks one of the two marks.
    """
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{where}: holds no {begin.strip()} and {end}; put both where the tables go")
    return f"{before}{begin}{text}{end}{after}"


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="replicate", description="Tables over seeds, from finished studies.")
    parser.add_argument("sources", nargs="+", type=Path, help="folders of finished studies, or one file of --json")
    parser.add_argument("--beside", type=Path, help="a run of another model, or its --json file: claims side by side")
    parser.add_argument("--json", type=Path, help="keep what the tables need of the runs, as a small file")
    parser.add_argument("--figure", type=Path, help="write a page with one row an arm and a dot a seed")
    parser.add_argument("--into", type=Path, help="put the tables between <!-- NAME: begin --> and end of this page")
    given = parser.parse_args(words)
    seeds = [seed for path in given.sources for seed in _read(path)]
    if given.json:
        write_seeds(given.json, seeds)
    if given.figure:
        atomic_write(given.figure, seeds_page({str(seed.seed): values(seed) for seed in seeds}))
    text = beside(seeds, _read(given.beside)[0]) if given.beside else tabulate(seeds)
    if given.into:
        mark = "beside" if given.beside else (given.json or given.sources[0]).stem
        page = put_between(given.into.read_text(encoding="utf-8"), mark, text, given.into)
        atomic_write(given.into, page)
    else:
        print(text)


def _read(path: Path) -> list[SeedEvidence]:
    return read_seeds(path) if path.is_file() else [read_run(path)]


def values(seed: SeedEvidence) -> dict[str, dict[str, Value]]:
    """Every arm's rates as fractions."""
    return {arm: {column: seed.value(arm, column) for column in RATES} for arm in seed.arms}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
