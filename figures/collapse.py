"""The readings of the collapse: layer by role heat maps, the final token's gap against the floor, and verdicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import band, curve
from pingscope.figures.numbers import MISSING, bounds, count, escape, number, plain, sort_layers, values
from pingscope.figures.section import Control, Key, Panel, Section
from pingscope.figures.tracks import ROLES
from pingscope.figures.verdicts import floor_note, readings_table, verdict_table
from pingscope.schema import Results

PLACES = {"prompt": "whole prompt", "instruction": "instruction", "final": "final token"}


def section(results: Results) -> Section | None:
    collapse = results.collapse or {}
    if not collapse:
        return None
    arms = theme.sort_arms(list(collapse))
    start = "agent" if "agent" in arms else arms[0]
    layers = sort_layers({layer for arm in arms for layer in collapse[arm]})
    panels = []
    for arm in arms:
        panels += _maps(results, arm, layers, {"arm": arm})
    floor_known = any(_floor(collapse, arm, layer) for arm in arms for layer in layers)
    panels.append(
        Panel(
            "Gap at the final token, by layer",
            _gap_by_layer(collapse, arms, layers),
            "Harmful minus benign logit at the final token, by layer and arm.",
            wide=True,
            keys=[
                *[Key(arm, theme.arm_key(arm), theme.arm_mark(arm)) for arm in arms],
                *([Key("noise floor", "control", "band")] if floor_known else []),
            ],
        )
    )
    return Section(
        id="collapse",
        title="Readings of the collapse",
        question="Is the signal weaker, only moved, or gone? Each reading beside the others, and beside the noise.",
        reading=(
            "Rows of a map are layers, columns are places in the prompt. Contrast is the harmful mean minus the benign "
            "mean at the same place; shift is this arm minus the base on the same harmful prompts; AUROC is how well "
            "the probe tells the two kinds apart there (0.5 is chance). A verdict says collapse only where a reading "
            "leaves the range it takes under updates that change no behaviour (the floor)."
        ),
        panels=panels,
        controls=(Control("arm", "Arm", tuple((arm, arm) for arm in arms), start),) if len(arms) > 1 else (),
        tables=[
            table
            for arm in arms
            for table in (*verdict_table(arm, collapse[arm], layers), *readings_table(arm, collapse[arm], layers))
        ],
        columns=3,
        note=floor_note(results.floor or {}),
    )


def _maps(results: Results, arm: str, layers: list[str], view: dict[str, str]) -> list[Panel]:
    cells = (results.collapse or {})[arm]
    tracks = results.tracks or {}
    gap = _by_role(tracks.get(arm), layers, lambda cell, role: _minus(cell.get("harmful"), cell.get("benign"), role))
    if not gap[0]:
        gap = _by_place(cells, layers, "contrast", "gap")
    base = tracks.get("base") or {}
    shift: tuple[list[str], np.ndarray] = ([], np.empty((0, 0)))
    if arm != "base":
        own = tracks.get(arm) or {}
        joined = {
            l: {"harmful": (own.get(l) or {}).get("harmful"), "before": (base.get(l) or {}).get("harmful")}
            for l in layers
        }
        shift = _by_role(joined, layers, lambda cell, role: _minus(cell.get("harmful"), cell.get("before"), role))
        if not shift[0]:
            shift = _by_place(cells, layers, "shift", "harmful")
    area = _by_place(cells, layers, "contrast", "auroc")
    titles = (
        ("Contrast, logits", gap, None),
        ("Shift on harmful prompts, logits", shift, None),
        ("AUROC", area, (0.0, 1.0)),
    )
    return [
        Panel(title, _map(columns, layers, grid, limits), f"{title} for {arm}: layer by place.", view)
        for title, (columns, grid), limits in titles
        if columns
    ]


def _minus(one: Any, other: Any, role: str) -> float:
    return number((one or {}).get(role)) - number((other or {}).get(role))


def _by_role(arm: Any, layers: list[str], read: Any) -> tuple[list[str], np.ndarray]:
    if not arm:
        return [], np.empty((0, 0))
    columns = (*ROLES, "prompt", "final")
    grid = np.array([[read(arm.get(layer) or {}, role) for role in columns] for layer in layers], np.float32)
    return _known(list(columns), grid)


def _by_place(cells: dict[str, Any], layers: list[str], reading: str, name: str) -> tuple[list[str], np.ndarray]:
    grid = np.array(
        [
            [number((((cells.get(l) or {}).get(reading) or {}).get(place) or {}).get(name)) for place in PLACES]
            for l in layers
        ],
        np.float32,
    )
    return _known(list(PLACES), grid)


def _known(columns: list[str], grid: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Only the columns in which some layer has a number."""
    kept = [i for i in range(len(columns)) if not np.isnan(grid[:, i]).all()]
    return [columns[i] for i in kept], grid[:, kept]


def _map(columns: list[str], layers: list[str], grid: np.ndarray, limits: tuple[float, float] | None) -> go.Figure:
    size = 30 if len(layers) <= 16 else 14
    fig = theme.figure(size * len(layers) + 86, left=52, right=4, top=6, bottom=74)
    if limits:
        low, middle, high = limits[0], 0.5, limits[1]
    else:
        # One extreme cell (often a markup token) must not wash out the rest.
        reach = float(np.nanpercentile(np.abs(grid), 95)) or 1.0
        low, middle, high = -reach, 0.0, reach
    printed = len(layers) <= 16
    words = [[_cell(v, limits is not None) for v in row] for row in grid]
    fig.add_heatmap(
        z=grid,
        x=list(range(len(columns))),
        y=list(range(len(layers))),
        zmin=low,
        zmax=high,
        zmid=middle,
        colorscale=theme.AREA if limits else theme.DIVERGING,
        showscale=False,
        xgap=1.5,
        ygap=1.5,
        text=words,
        texttemplate="%{text}" if printed else "",
        textfont={"size": 11, "color": theme.colour("ink")},
        customdata=[[[PLACES.get(c, c), escape(l)] for c in columns] for l in layers],
        hovertemplate="layer %{customdata[1]}, %{customdata[0]}: %{text}<extra></extra>",
    )
    fig.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=[{"prompt": "mean"}.get(c, c) for c in columns],
        tickangle=-45 if len(columns) > 3 else 0,
        showgrid=False,
        ticks="",
    )
    fig.update_yaxes(
        tickvals=list(range(len(layers))),
        ticktext=[escape(layer) for layer in layers],
        nticks=16,
        showgrid=False,
    )
    return fig


def _cell(value: float, fraction: bool) -> str:
    if math.isnan(value):
        return MISSING
    return plain(float(value), 2 if fraction else 1)


def _floor(collapse: dict[str, Any], arm: str, layer: str) -> dict[str, Any] | None:
    cell = (collapse[arm].get(layer) or {}).get("floor") or {}
    return ((cell.get("contrast") or {}).get("final") or {}).get("gap")


def _gap_by_layer(collapse: dict[str, Any], arms: list[str], layers: list[str]) -> go.Figure:
    fig = theme.figure(290, left=52, right=16, top=12, bottom=46)
    x = np.arange(len(layers), dtype=np.float32)
    for arm in arms:
        floors = [_floor(collapse, arm, layer) or {} for layer in layers]
        if any(floors):
            low, high = (np.array([number(f.get(end)) for f in floors], np.float32) for end in ("low", "high"))
            band(fig, x, low, high, theme.colour("control", 0.28))
            break  # the floor belongs to the layer, not to the arm
    for arm in arms:
        cells = [
            (((collapse[arm].get(layer) or {}).get("contrast") or {}).get("final") or {}).get("gap") for layer in layers
        ]
        curve(
            fig,
            x,
            values(cells),
            *bounds(cells),
            colour=theme.arm_key(arm),
            dash=theme.ARM_DASHES.get(arm, "solid"),
            hover=f"<b>{escape(arm)}: %{{customdata[0]}}</b><br>layer %{{customdata[2]}}, n = %{{customdata[1]}}",
            details=[[plain(c), count(c), escape(l)] for c, l in zip(cells, layers, strict=True)],
        )
    fig.add_hline(y=0, line={"color": theme.colour("muted"), "width": 1}, layer="below")
    step = max(1, math.ceil(len(layers) / 16))
    fig.update_xaxes(title_text="layer", tickvals=list(x[::step]), ticktext=layers[::step], showgrid=False)
    fig.update_yaxes(title_text="harmful − benign, logits", nticks=6)
    return fig
