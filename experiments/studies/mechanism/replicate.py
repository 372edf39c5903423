"""The mechanism in several pairs of models, as one table.

    python -m pingscope.experiments.studies.mechanism.replicate RUN RUN …

Reads finished runs of `pingscope mechanism` (or of a study with its mechanism on) and prints Markdown, one column a
run. A star marks what stands after false discovery control within its run; no run is left out of any row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.cli.tables import percent, signed
from pingscope.experiments.studies.replicate import markdown
from pingscope.interp.files import read_json
from pingscope.probes.multiplicity import Q

Runs = list[dict[str, Any]]
PLACES = ("system", "instruction", "page", "header", "final")


def tabulate(folders: Sequence[Path]) -> str:
    """Markdown over the runs in ``folders``; sections that no run has are left out."""
    runs = [read_json(folder / "results.json") for folder in folders]
    names = [folder.name for folder in folders]
    parts: list[tuple[str, str, Callable[[Runs], list[list[str]]]]] = [
        ("attribution", "Gap of the base's probe at the final token, by what wrote it: base minus agent", _attribution),
        ("patching", "Share of the lost refusal log-odds that a patch moves, harmful tasks, per cent", _patching),
        ("restoration", "The smallest set of heads and MLPs, patched at the final token alone", _restoration),
        ("readout", "Readout against knowledge, at the final token", _readout),
        ("detectors", "Harmful test tasks caught / benign flagged at a threshold for 1%, per cent", _detectors),
    ]
    return "\n".join(
        f"### {title}\n\n{markdown(['', *names], rows(runs))}"
        for section, title, rows in parts
        if any(run.get(section) for run in runs)
    )


def _attribution(runs: Runs) -> list[list[str]]:
    cells = [list(run["attribution"]["layers"].values())[-1] for run in runs]
    rows = [["layer", *(list(run["attribution"]["layers"])[-1] for run in runs)]]
    rows.append(["n, " + " + ".join(runs[0]["attribution"]["n"]),
                 *(" + ".join(map(str, run["attribution"]["n"].values())) for run in runs)])  # fmt: skip
    rows += [[words, *(signed(cell["total"][name]) for cell in cells)] for name, words in
             (("base", "gap, base"), ("agent", "gap, agent"), ("lost", "**lost**"))]  # fmt: skip
    rows.append(
        ["lost by random directions", *("; ".join(signed(draw["total"]) for draw in cell["random"]) for cell in cells)]
    )
    for i, name in enumerate(cells[0]["components"][:-1]):
        rows.append([f"lost by {name}", *(signed(cell["lost"][i]) + _star(cell["q"][i]) for cell in cells)])
    heads = ["; ".join(f"{h['name'][5:]} {h['lost']['value']:+.1f}{_star(h['q'])}" for h in cell["heads"][:3])
             for cell in cells]  # fmt: skip
    return [*rows, ["heads that lost most", *heads]]


def _patching(runs: Runs) -> list[list[str]]:
    rows = [
        [f"refusal log-odds, {model}", *(signed(run["patching"]["reference"][model]["harmful"]) for run in runs)]
        for model in ("base", "agent")
    ]
    for direction, words in (("denoise", "base into agent"), ("noise", "agent into base")):
        maps = [run["patching"]["maps"][direction]["harmful"] for run in runs]
        for layer in maps[0]:
            for place in [name for name in PLACES if name in maps[0][layer]]:
                found = [cells[layer][place] for cells in maps]
                rows.append([f"{words}, {layer}, {place}", *(percent(c["share"]) + _star(c["q"]) for c in found)])
                for control, what in (("control", "… of a benign prompt"), ("neutral", "… its own, of a benign one")):
                    if place == "final":
                        rows.append([what, *(percent(c.get(control)) for c in found)])
    for layer in runs[0]["patching"].get("outcome", {}).get("denoise", {}):
        cells = [run["patching"]["outcome"]["denoise"][layer]["final"] for run in runs]
        rows.append([f"generated: harmful refused, base into agent, {layer}, final",
                     *(percent(cell["harmful"]["refusal_rate"]) for cell in cells)])  # fmt: skip
        rows.append(["… benign refused", *(percent(cell["benign"]["refusal_rate"]) for cell in cells)])
    return rows


def _restoration(runs: Runs) -> list[list[str]]:
    found = [run.get("restoration") for run in runs]

    def row(words: str, read: Callable[[dict[str, Any]], str]) -> list[str]:
        return [words, *("nothing to restore" if cell is None else read(cell) for cell in found)]

    def drawn(cell: dict[str, Any]) -> str:
        values = [one["value"] for one in cell["held_out"]["random"]["refusal_restored"] if one["value"] is not None]
        if not values:
            return "–"
        return f"{len(values)} sets: mean {100 * sum(values) / len(values):.0f}, highest {100 * max(values):.0f}"

    return [
        row("held out / searched on", lambda c: f"{c['family']} / {', '.join(c['families'])}"),
        row("chosen", lambda c: ", ".join(c["chosen"]) or "none"),
        row("of the components", lambda c: f"{len(c['chosen'])} of {c['components']}"),
        row("forward passes", lambda c: str(c["forward_passes"])),
        row("selection: decisions / log-odds", lambda c: _both(c["restored"])),
        row("selection: all components", lambda c: _both(c["ceiling"])),
        row("held out: refusals restored", lambda c: percent(c["held_out"]["refusal_restored"])),
        row("held out: log-odds restored", lambda c: percent(c["held_out"]["restored"])),
        row("held out: random sets, refusals", drawn),
        row("held out: random sets, log-odds", lambda c: percent(c["held_out"]["random"]["restored"])),
        row("benign success lost", lambda c: percent(c["held_out"]["cost"])),
        row("n harmful", lambda c: str(c["held_out"]["restored"]["n"])),
    ]


def _readout(runs: Runs) -> list[list[str]]:
    rows = []
    for layer in runs[0]["readout"]["cosine"]:
        cells = [run["readout"]["cosine"][layer] for run in runs]
        for model in ("base", "agent"):
            rows.append([f"{layer}: cosine of probe and refusal direction, {model}",
                         *(signed(cell["probe_refusal"].get(model)) for cell in cells)])  # fmt: skip
        rows.append([f"{layer}: cosine of the two probes", *(_number(cell["probes"]) for cell in cells)])
    rows.append(["chance (95% of random directions)", *(_number(cell["chance"]) for cell in cells)])
    last = next(reversed(runs[0]["readout"]["lens"]["base"]))
    for model in ("base", "agent"):
        lens = [run["readout"]["lens"][model][last]["harmful"]["refusal"] for run in runs]
        rows.append([f"mass of refusal starts, harmful, {model}, per cent", *(percent(cell) for cell in lens)])
    return rows


def _detectors(runs: Runs) -> list[list[str]]:
    rows = []
    for model in runs[0]["detectors"]:
        for name in runs[0]["detectors"][model]["detectors"]:
            cells = [run["detectors"][model]["detectors"][name] for run in runs]
            rows.append([f"{model}: {name}", *(f"{percent(cell['tpr'])} / {percent(cell['fpr'])}" for cell in cells)])
    return rows


def _star(q: float | None) -> str:
    return "*" if q is not None and q <= Q else ""


def _both(restored: dict[str, float]) -> str:
    return f"{100 * restored['decisions']:.0f} / {100 * restored['log_odds']:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


if __name__ == "__main__":
    print(tabulate([Path(word) for word in sys.argv[1:]]))
