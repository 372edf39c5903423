"""The smallest set of components that brings refusal back, and knowledge against readout by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import curve
from pingscope.figures.numbers import bounds, count, escape, number, percent, plain, sort_layers, values
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Results

SETS = (
    "Heads and MLPs are added one by one by what they restore on validation tasks of the other families; the dotted "
    "line is the bar of 80%, the last point what all components together restore. What counts is the table: test tasks "
    "of the family the search never saw, beside random sets of the same size."
)
LENS = "The logit lens decodes the stream after each layer as if it were the last."
FAMILIES = {"held_out": "held-out family", "seen": "other families"}


def section(results: Results) -> Section | None:
    found, readout = results.restoration or {}, results.readout or {}
    if not found and not readout:
        return None
    panels, tables = [], []
    if found:
        both = [Key("decisions for refusal", "prefix", "line"), Key("log-odds", "other", "line")]
        words = "Share restored as components are added."
        panels.append(Panel("Restored on the selection tasks", _path(found), words, keys=both))
        tables.append(_table(found))
    if readout:
        both = [Key("base, harmful", "base", "line"), Key("agent, harmful", "agent", "dash")]
        words = "Refusal mass by layer."
        panels.append(Panel("Logit lens: mass of refusal starts", _lens(readout), words, keys=both))
        tables.append(_cosines(readout))
    return Section(
        id="restoration",
        title="Few components, and knowledge against readout" if found else "Knowledge against readout",
        question="How little of the base must be put back, at the final token alone, for refusal to return?"
        if found
        else "Does what knows of harm lie along what refuses, and where does the decision appear?",
        reading=" ".join(words for words, there in ((SETS, found), (LENS, readout)) if there),
        panels=panels,
        tables=tables,
        columns=2,
        note=_note(found) if found else "",
    )


def _path(found: dict[str, Any]) -> go.Figure:
    path = found.get("path") or []
    fig = theme.figure(300, left=52, right=16, top=12, bottom=70)
    names = ["none", *[step["component"] for step in path], "all"]
    x = list(range(len(names)))
    series = (("decisions", "prefix", "prompts decided"), ("log_odds", "other", "log-odds"))
    for key, tint, words in series:
        y = [0.0, *[step[key] for step in path], (found.get("ceiling") or {}).get(key)]
        fig.add_scatter(
            x=x, y=np.array(y, np.float32), mode="lines+markers",
            line={"color": theme.colour(tint), "width": 2}, marker={"color": theme.colour(tint), "size": 7},
            customdata=[[escape(name)] for name in names],
            hovertemplate=f"%{{customdata[0]}}: {words} %{{y:.0%}}<extra></extra>",
        )  # fmt: skip
    fig.add_hline(
        y=found.get("target", 0.8), line={"color": theme.colour("muted"), "width": 1, "dash": "dot"}, layer="below"
    )
    theme.percent_axis(fig, "y")
    fig.update_xaxes(tickvals=x, ticktext=[escape(name) for name in names], tickangle=-45, showgrid=False)
    return fig


def _table(found: dict[str, Any]) -> Table:
    rows = []
    for key, words in FAMILIES.items():
        cell = found.get(key)
        if not cell:
            continue
        rates = [percent(cell["refusal_rate"][name]) for name in ("base", "agent", "patched")]
        random = cell["random"]
        judged = [number(draw) for draw in random.get("refusal_restored") or []]
        judged = [value for value in judged if not np.isnan(value)]
        drawn = f"{100 * np.mean(judged):.0f}% ({100 * max(judged):.0f}%)" if judged else "–"
        name = f"{words} ({found['family']})" if key == "held_out" else words
        rows.append(
            [name, *rates, percent(cell["refusal_restored"]), percent(cell["restored"]), drawn,
             percent(cell["cost"]), count(cell["restored"])]
        )  # fmt: skip
    head = ["Test tasks", "Base refuses", "Agent", "Patched", "Refusals restored", "Log-odds restored",
            "Random sets, mean (best)", "Benign success lost", "n"]  # fmt: skip
    return Table(
        f"What {', '.join(found['chosen']) or 'no component'} restore at the final token, 95% intervals.", head, rows
    )


def _lens(readout: dict[str, Any]) -> go.Figure:
    fig = theme.figure(300, left=52, right=16, top=12, bottom=70)
    for model, dash, symbol in (("base", "solid", "circle"), ("agent", "dash", "square")):
        lens = (readout.get("lens") or {}).get(model) or {}
        layers = sort_layers(lens)
        cells = [(lens[layer].get("harmful") or {}).get("refusal") for layer in layers]
        curve(
            fig, np.arange(len(layers), dtype=np.float32), values(cells), *bounds(cells), colour=model, dash=dash,
            symbol=symbol, hover=f"{model}: %{{customdata[0]}}<br>layer %{{customdata[1]}}",
            details=[[percent(cell), escape(layer)] for cell, layer in zip(cells, layers, strict=True)],
        )  # fmt: skip
        step = max(1, len(layers) // 12)
        fig.update_xaxes(
            title_text="layer", tickvals=list(range(0, len(layers), step)), ticktext=layers[::step], showgrid=False
        )
    theme.percent_axis(fig, "y")
    return fig


def _cosines(readout: dict[str, Any]) -> Table:
    rows = []
    for layer in sort_layers(readout["cosine"]):
        cell = readout["cosine"][layer]
        own = [plain(cell["probe_refusal"].get(model)) for model in ("base", "agent")]
        between = [
            "–" if cell.get(k) is None else f"{cell[k]:.2f}".replace("-", "\u2212") for k in ("probes", "refusals")
        ]
        rows.append([layer, *own, *between, f"{cell['chance']:.2f}"])
    head = [
        "Layer",
        "Probe and refusal, base",
        "… agent",
        "Probes, base and agent",
        "Refusal, base and agent",
        "Chance",
    ]
    n = "; ".join(f"{model}: {c['refused']} refused, {c['not_refused']} not" for model, c in readout["n"].items())
    return Table(f"Cosines at the final token ({n}); a dash: too few of one kind.", head, rows, folded=True)


def _note(found: dict[str, Any]) -> str:
    return (
        f"{len(found['chosen'])} of {found['components']} heads and MLPs ({100 * found['share']:.0f}%), found with "
        f"{found['forward_passes']} forward passes over {', '.join(found['families'])}; held out: {found['family']}."
    )
