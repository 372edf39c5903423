"""Which components lost the signal: a waterfall from the base's gap to the agent's, and the heads, ranked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import bounds, count, error_bar, escape, number, plain, sort_layers, values
from pingscope.figures.section import Key, Panel, Section, Table, layer_control
from pingscope.schema import Results

MOST_BARS = 16
MOST_HEADS = 12


def section(results: Results) -> Section | None:
    layers_found = (results.attribution or {}).get("layers") or {}
    if not layers_found:
        return None
    layers = sort_layers(layers_found)
    start = layers[-1]
    panels = []
    for layer in layers:
        cell, view = layers_found[layer], {"layer": layer} if len(layers) > 1 else {}
        alt = f"From the base's to the agent's harmful-benign gap after layer {layer}, component by component."
        panels.append(Panel("From base to agent, gap in logits", _waterfall(cell), alt, view))
        if cell.get("heads"):
            panels.append(Panel("Heads, gap lost", _heads(cell["heads"]), f"Heads by gap lost, layer {layer}.", view))
    return Section(
        id="attribution",
        title="Which components lost the signal",
        question="The probe’s logit is a sum of what each component wrote. Which of them stopped writing?",
        reading=(
            "The logit at the final token is exactly the sum of the embedding, every attention layer, every MLP and "
            "the intercept. Each bar is the part of the harmful minus benign gap that one component lost (base minus "
            "agent, same prompts), with a 95% interval; filled bars stand after false discovery control, grey ones do "
            "not. To be the probe’s own, a loss must exceed what random directions of the same length lose."
        ),
        panels=panels,
        controls=layer_control(layers, start),
        keys=[Key("gap of the model", "base", "square"), Key("lost", "cold", "square"), Key("gained", "hot", "square"),
              Key("not told from chance", "start", "square")],
        tables=[_table(layer, layers_found[layer]) for layer in layers],
        columns=2,
        note=_note(layers_found[start], start),
    )  # fmt: skip


def _waterfall(cell: dict[str, Any]) -> go.Figure:
    names, lost = cell["components"][:-1], cell["lost"][:-1]  # the intercept is the same in both
    q = [math.nan if value is None else value for value in cell["q"][:-1]]
    kept = sorted(np.argsort(-np.abs(np.nan_to_num(values(lost))))[:MOST_BARS])
    others = [i for i in range(len(names)) if i not in set(kept)]
    steps: list[tuple[str, float, str, Any]] = []
    for i in kept:
        sure = not math.isnan(q[i]) and q[i] <= 0.05
        tint = ("cold" if number(lost[i]) > 0 else "hot") if sure else "start"
        steps.append((names[i], -number(lost[i]), tint, lost[i]))
    if others:
        rest = float(np.nansum(values([lost[i] for i in others])))
        steps.append((f"{len(others)} others", -rest, "start", None))
    before, after = (number(cell["total"][name]) for name in ("base", "agent"))
    fig = theme.figure(24 * (len(steps) + 2) + 62, left=96, right=16, top=8, bottom=44)
    at = before
    bars = [("base", 0.0, before, "base", cell["total"]["base"])]
    for name, change, tint, estimate in steps:
        bars.append((name, at, change, tint, estimate))
        at += change
    bars.append(("agent", 0.0, after, "agent", cell["total"]["agent"]))
    low, high = bounds([bar[4] for bar in bars])
    half = np.where(np.isnan(low), 0, (high - low) / 2)
    fig.add_bar(
        x=np.array([bar[2] for bar in bars], np.float32),
        base=np.array([bar[1] for bar in bars], np.float32),
        y=list(range(len(bars))),
        orientation="h",
        width=0.66,
        marker={"color": [theme.colour(bar[3]) for bar in bars]},
        error_x={"type": "data", "array": half.astype(np.float32), "thickness": 1.4, "width": 0,
                 "color": theme.colour("ink")},
        customdata=[[escape(bar[0]), plain(bar[4], 2, True) if bar[4] else f"{-bar[2]:+.2f}"] for bar in bars],
        hovertemplate="<b>%{customdata[0]}</b>: %{customdata[1]}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(title_text="harmful minus benign, logits", zeroline=True, zerolinecolor=theme.colour("rule"))
    _rows(fig, [bar[0] for bar in bars])
    return fig


def _heads(heads: list[dict[str, Any]]) -> go.Figure:
    shown = heads[:MOST_HEADS]
    cells = [head["lost"] for head in shown]
    fig = theme.figure(24 * len(shown) + 62, left=76, right=16, top=8, bottom=44)
    sure = [head.get("q") is not None and head["q"] <= 0.05 for head in shown]
    tints = [("cold" if number(c) > 0 else "hot") if s else "start" for c, s in zip(cells, sure, strict=True)]
    fig.add_bar(
        x=values(cells), y=list(range(len(shown))), orientation="h", width=0.66,
        marker={"color": [theme.colour(tint) for tint in tints]},
        error_x=error_bar(cells, theme.colour("ink")),
        customdata=[[escape(head["name"]), plain(head["lost"]), plain(head["base"]), plain(head["agent"])]
                    for head in shown],
        hovertemplate="<b>%{customdata[0]}</b>: lost %{customdata[1]}<br>base %{customdata[2]}, "
                      "agent %{customdata[3]}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(title_text="gap lost, logits", zeroline=True, zerolinecolor=theme.colour("rule"))
    _rows(fig, [head["name"] for head in shown])
    return fig


def _rows(fig: go.Figure, names: list[str]) -> None:
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[escape(name, 20) for name in names],
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        tickfont={"color": theme.colour("ink"), "size": 12},
    )


def _table(layer: str, cell: dict[str, Any]) -> Table:
    rows = []
    for i, name in enumerate(cell["components"]):
        band = f"[{cell['shuffled']['low'][i]:.2f}, {cell['shuffled']['high'][i]:.2f}]".replace("-", "\u2212")
        q = cell["q"][i]
        gaps = [plain(cell[model]["gap"][i]) for model in ("base", "agent")]
        rows.append([name, *gaps, plain(cell["lost"][i]), band, "–" if q is None else f"{q:.3f}"])
    head = ["Component", "Base", "Agent", "Lost", "Shuffled labels", "q"]
    total = cell["total"]
    n = count(total["lost"])
    rows.append(["sum", plain(total["base"]), plain(total["agent"]), plain(total["lost"]), "–", "–"])
    return Table(
        f"Harmful minus benign parts of the logit after layer {layer}, 95% intervals, n = {n}.",
        head, rows, folded=True, view={"layer": layer},
    )  # fmt: skip


def _note(cell: dict[str, Any], layer: str) -> str:
    random = "; ".join(plain(draw["total"]) for draw in cell.get("random") or [])
    residue = cell.get("largest_residue")
    checked = "" if residue is None else f" The parts sum to the logit within {residue:.1e} on every prompt."
    return (f"Gap lost by random directions after layer {layer}: {random}." if random else "") + checked
