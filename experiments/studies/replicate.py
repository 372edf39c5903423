"""The same study under several seeds, as one table.

    python -m pingscope.experiments.studies.replicate runs/seed-0 runs/seed-1 …

Reads finished runs (`pingscope study --seed N --out runs/seed-N`) and prints Markdown: what replicated, with every
seed beside the others, and every claim that failed in any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.cli.tables import percent, signed
from pingscope.interp.files import read_json

RATES = (("harmful", "refusal_rate"), ("benign", "success_rate"), ("lookalike", "refusal_rate"))
READINGS = (("raw", "harmful"), ("contrast", "gap"), ("contrast", "auroc"), ("contrast", "gap_shrink"))


def tabulate(folders: Sequence[Path]) -> str:
    """Markdown tables over the runs in ``folders``, one column a run."""
    runs = [read_json(folder / "results.json") for folder in folders]
    seeds = [f"seed {run['meta']['seeds']['study']}" for run in runs]
    parts = [
        "### Behaviour on test tasks\n\nPer cent, harmful refused / benign done / look-alike refused, strict judge; "
        f"n = {', '.join(str(run['behaviour']['base']['harmful']['strict']['refusal_rate']['n']) for run in runs)} "
        "a cell.\n",
        markdown(["arm", *seeds], _behaviour(runs)),
        "### Steering at the final token\n\nLayers and dose chosen on validation tasks; the largest of the random "
        "draws' harmful refusals beside it.\n",
        markdown(["", *seeds], _steering(runs)),
        "### Readings at the final token\n\nAgent against base, 95% intervals over prompts; the floor is the range "
        "over updates that change no behaviour.\n",
        markdown(["layer and reading", *seeds], _readings(runs)),
        "### Claims\n",
        markdown(["claim", *seeds], _claims(runs)),
        "### Training and cost\n",
        markdown(["", *seeds], _training(runs)),
    ]
    return "\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(rates: dict[str, Any]) -> str:
    values = [rates[label]["strict"][name]["value"] for label, name in RATES]
    return " / ".join("–" if value is None else f"{100 * value:.0f}" for value in values)


def _behaviour(runs: list[dict[str, Any]]) -> list[list[str]]:
    return [[arm, *(_cell(run["behaviour"][arm]) for run in runs)] for arm in runs[0]["behaviour"]]


def _steering(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows: list[list[str]] = [["layers, dose"], ["steered"], ["random, worst harmful refusal"]]
    for run in runs:
        chosen = run["steering_chosen"]
        cells = {operator: grid[chosen["layers"]][chosen["dose"]] for operator, grid in run["steering"].items()}
        worst = max(
            (cell["harmful"]["strict"]["refusal_rate"] for name, cell in cells.items() if name.startswith("random")),
            key=lambda rate: rate["value"],
        )
        rows[0].append(f"{chosen['layers']}, {chosen['dose']}")
        rows[1].append(_cell(cells["add"]))
        rows[2].append(percent(worst))
    return rows


def _readings(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for layer in runs[0]["collapse"]["agent"]:
        for reading, name in READINGS:
            row = [f"{layer}: {reading} {name}"]
            for run in runs:
                found = run["collapse"]["agent"][layer]
                value = signed(found[reading]["final"].get(name))
                limit = found["floor"][reading]["final"].get(name) or {}
                low, high = limit.get("low"), limit.get("high")
                row.append(value + ("" if low is None else f"; floor {low:.2f} to {high:.2f}"))
            rows.append(row)
    return rows


def _claims(runs: list[dict[str, Any]]) -> list[list[str]]:
    words = {True: "holds", False: "**does not hold**", None: "not measured"}
    by_id = [{claim["id"]: claim["holds"] for claim in run["claims"]} for run in runs]
    names = list(dict.fromkeys(name for claims in by_id for name in claims))
    return [[name, *(words[claims.get(name)] for claims in by_id)] for name in names]


def _training(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows: list[list[str]] = [
        ["bases rejected"],
        ["stop at step"],
        ["searched prefix"],
        ["base + agent, s"],
        ["study, s"],
        ["peak, MB"],
    ]
    for run in runs:
        attempts = run["meta"]["organism"]["attempts"]
        rows[0].append(str(len(attempts) - 1))
        rows[1].append(str(attempts[-1]["checks"][-1][0]))
        rows[2].append(f"`{run['search']['winner'].strip()}`")
        rows[3].append(f"{sum(a['base_seconds'] + a['agent_seconds'] for a in attempts):.0f}")
        rows[4].append(f"{sum(run['meta']['seconds'].values()):.0f}")
        rows[5].append(str(run["meta"]["peak_memory_mb"]))
    return rows


if __name__ == "__main__":
    print(tabulate([Path(word) for word in sys.argv[1:]]))
