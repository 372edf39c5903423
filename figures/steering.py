"""Steering: refusal and success against dose, with norm-matched random directions as the control."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import band, curve
from pingscope.figures.numbers import bounds, count, number, percent, plain, rate, sort_layers, values
from pingscope.figures.section import Control, Key, Panel, Section, Table
from pingscope.schema import Results

CURVES = (("harmful", "refusal_rate"), ("lookalike", "refusal_rate"), ("benign", "success_rate"))
WORDS = {"harmful": "harmful tasks refused", "lookalike": "look-alike tasks refused", "benign": "benign tasks done"}


def is_control(operator: str) -> bool:
    return operator.startswith(("random", "shuffled"))


def section(results: Results) -> Section | None:
    steering = results.steering or {}
    operators = [name for name in steering if not is_control(name)]
    if not operators:
        return None
    controls = [name for name in steering if is_control(name)]
    layers = sort_layers({layer for name in operators for layer in steering[name]})
    start = next((layer for layer in layers if "-" in layer[1:]), layers[len(layers) // 2])
    options = tuple((layer, f"layers {layer.replace('-', '–')}" if "-" in layer[1:] else layer) for layer in layers)
    panels = [
        Panel(_title(name), _doses(steering, name, controls, layers, start), f"Rates against dose for {name}.")
        for name in operators
    ]
    return Section(
        id="steering",
        title="Steering",
        question="How much of a probe’s direction brings refusal back, and what does it cost?",
        reading=(
            "The dose is the length of the added vector in units of the mean residual norm at that layer. Good "
            "steering lifts the harmful curve while the benign curve stays at the top and the look-alike curve at the "
            "bottom. The grey band is harmful refusal under random directions of the same length: what the "
            "direction itself adds lies above it."
        ),
        panels=panels,
        controls=(Control("layer", "Layer", options, start, "range" if len(layers) > 6 else "choice"),)
        if len(layers) > 1
        else (),
        keys=[
            Key(WORDS["harmful"], "harmful", "line"),
            Key(WORDS["lookalike"], "lookalike", "dotted"),
            Key(WORDS["benign"], "benign", "dash"),
            *([Key("harmful tasks refused, random directions", "control", "band")] if controls else []),
        ],
        tables=[_table(steering, operators + controls), *_side_effects(results)],
        columns=min(2, len(panels)),
    )


def _title(operator: str) -> str:
    return {"add": "Adding the direction"}.get(operator, operator)


def _doses(steering: dict[str, Any], operator: str, controls: list[str], layers: list[str], start: str) -> go.Figure:
    fig = theme.figure(340, left=52, right=20, top=12, bottom=48)
    ticks: set[float] = set()
    for layer in layers:
        doses = steering[operator].get(layer) or {}
        view: dict[str, Any] = {"meta": {"layer": layer}, "visible": layer == start}
        _control_band(fig, [(steering[name].get(layer) or {}) for name in controls], view)
        keys = sorted(doses, key=float)
        ticks |= {float(key) for key in keys}
        for label, name in CURVES:
            cells = [rate(doses[key], label, name) for key in keys]
            curve(
                fig,
                np.array([float(key) for key in keys], np.float32),
                values(cells),
                *bounds(cells),
                colour=label,
                dash=theme.DASHES[label],
                symbol=theme.SYMBOLS[label],
                hover=f"{WORDS[label]}: %{{customdata[0]}}<br>dose %{{x:.3g}}, n = %{{customdata[1]}}",
                details=[[percent(cell), count(cell)] for cell in cells],
                **view,
            )
    theme.percent_axis(fig, "y")
    marks: list[float] = []
    for tick in sorted(ticks):  # labels that would touch on a phone are left out
        if not marks or tick - marks[-1] >= (max(ticks) - min(ticks)) / 6:
            marks.append(tick)
    fig.update_xaxes(
        title_text="dose, in residual norms",
        tickvals=marks,
        ticktext=[f"{mark:g}" for mark in marks],
        tickangle=0,
        showgrid=False,
    )
    return fig


def _control_band(fig: go.Figure, draws: list[dict[str, Any]], view: dict[str, Any]) -> None:
    """Envelope of the controls' harmful refusal: lowest lower end to highest upper end at each dose."""
    keys = sorted({key for draw in draws for key in draw}, key=float)
    if not keys:
        return
    low, high, middle = [], [], []
    for key in keys:
        cells = [rate(draw.get(key), "harmful", "refusal_rate") for draw in draws]
        ends = [end for pair in zip(*bounds(cells), strict=True) for end in pair if not np.isnan(end)]
        points = [number(cell) for cell in cells if not np.isnan(number(cell))]
        low.append(min([*ends, *points], default=np.nan))
        high.append(max([*ends, *points], default=np.nan))
        middle.append(float(np.mean(points)) if points else np.nan)
    x = np.array([float(key) for key in keys], np.float32)
    band(fig, x, np.array(low, np.float32), np.array(high, np.float32), theme.colour("control", 0.28), **view)
    fig.add_scatter(
        x=x,
        y=np.array(middle, np.float32),
        mode="lines",
        line={"color": theme.colour("control"), "width": 1.5},
        hovertemplate="random directions: %{y:.0%}<extra></extra>",
        **view,
    )


def _table(steering: dict[str, Any], operators: list[str]) -> Table:
    rows = []
    for operator in operators:
        for layer in sort_layers(steering[operator]):
            for dose in sorted(steering[operator][layer], key=float):
                cell = steering[operator][layer][dose]
                harmful = rate(cell, "harmful", "refusal_rate")
                shares = [percent(rate(cell, label, name)) for label, name in CURVES]
                rows.append([operator, layer.replace("-", "–"), f"{float(dose):g}", *shares, count(harmful)])
    head = ["Operator", "Layers", "Dose", "Harmful refused", "Look-alike refused", "Benign done", "n"]
    return Table("Every dose and layer, with 95% intervals.", head, rows, folded=True)


def _side_effects(results: Results) -> list[Table]:
    """What each dose does to benign text that should stay as it is."""
    effects = results.steering_coherence or {}
    if not effects:
        return []
    chosen = results.steering_chosen or {}
    rows = [
        [
            f"{float(dose):g}" + (" (chosen)" if dose == chosen.get("dose") else ""),
            plain(effects[dose]["kl"], 3),
            plain(effects[dose]["perplexity"]),
            plain(effects[dose]["perplexity_before"]),
            count(effects[dose]["kl"]),
        ]
        for dose in sorted(effects, key=float)
    ]
    head = ["Dose", "KL, nats a token", "Perplexity", "Perplexity, unsteered", "n"]
    where = f", layers {chosen['layers']}, {chosen['place']}" if "place" in chosen else ""
    return [Table(f"Side effects on the agent’s own benign answers{where}.", head, rows, folded=True)]
