"""The readings of the collapse: layer by role heat maps, the final token's gap against the floor, and verdicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from figures import theme
from figures.marks import band, curve
from figures.numbers import MISSING, bounds, count, escape, number, plain, sort_layers, values
from figures.section import Control, Key, Panel, Section, Table
from figures.tracks import ROLES

READINGS = {
    "raw": "Raw logit",
    "contrast": "Contrast (harmful minus benign)",
    "shift": "Shift against the base",
    "placed": "Probe trained at the position",
    "transfer": "Base’s probe trained there, read on this arm",
    "realigned": "Base’s probe after a label-free map",
}
PLACES = {"prompt": "whole prompt", "instruction": "instruction", "final": "final token"}


def section(results: dict[str, Any]) -> Section | None:
    collapse = results.get("collapse") or {}
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
            table for arm in arms for table in (*_verdicts(arm, collapse[arm], layers), *_tables(collapse, arm, layers))
        ],
        columns=3,
        note=_floor_note(results.get("floor") or {}),
    )


def _verdicts(arm: str, cells: dict[str, Any], layers: list[str]) -> list[Table]:
    """One row a reading: at which layers it shows a collapse, at which it does not, and why at the last."""
    rows = []
    for reading, words in READINGS.items():
        said = {l: v for l in layers if (v := ((cells.get(l) or {}).get("verdict") or {}).get(reading))}
        if not said:
            continue
        fallen = [l for l, v in said.items() if v.get("verdict") == "collapse"]
        absent = [l for l in said if l not in fallen]
        last = list(said)[-1]
        reason = f"{last}: {said[last].get('reason')}" if said[last].get("reason") else MISSING
        rows.append([words, _layers("▼", fallen, said), _layers("○", absent, said), reason])
    head = ["Verdict by reading", "▼ Collapse at layers", "○ Absent at layers", "Reason at the last layer"]
    return (
        [Table(f"Verdicts for {arm}, at the final token.", head, rows, text_columns=4, view={"arm": arm})]
        if rows
        else []
    )


def _layers(mark: str, found: list[str], asked: dict[str, Any]) -> str:
    if not found:
        return MISSING
    return f"{mark} " + ("all" if len(found) == len(asked) > 1 else ", ".join(found))


def _maps(results: dict[str, Any], arm: str, layers: list[str], view: dict[str, str]) -> list[Panel]:
    cells = results["collapse"][arm]
    tracks = results.get("tracks") or {}
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


def _tables(collapse: dict[str, Any], arm: str, layers: list[str]) -> list[Table]:
    readings = (
        ("Raw, harmful", "raw", "harmful", 1),
        ("Raw, benign", "raw", "benign", 1),
        ("Gap", "contrast", "gap", 1),
        ("Gap lost", "contrast", "gap_shrink", 2),
        ("AUROC", "contrast", "auroc", 2),
        ("Shift, harmful", "shift", "harmful", 1),
        ("Placed probe AUROC", "placed", "auroc", 2),
        ("Transfer AUROC", "placed", "transfer_auroc", 2),
        ("Realigned gap", "realigned", "gap", 1),
    )
    rows = []
    for name, reading, leaf, digits in readings:
        cells = [(((collapse[arm].get(l) or {}).get(reading) or {}).get("final") or {}).get(leaf) for l in layers]
        if all(math.isnan(number(cell)) for cell in cells):
            continue
        rows.append([name, *[plain(cell, digits) for cell in cells]])
        floors = [
            (((((collapse[arm].get(l) or {}).get("floor") or {}).get(reading) or {}).get("final") or {}).get(leaf))
            for l in layers
        ]
        if any(isinstance(f, dict) for f in floors):
            rows.append(["  floor", *[_range(f, digits) for f in floors]])
    for name, control in (("Random weights", "random_weights"), ("Shuffled labels", "shuffled_labels")):
        cells = [(((collapse[arm].get(l) or {}).get("controls") or {}).get(control) or {}).get("auroc") for l in layers]
        if not all(math.isnan(number(cell)) for cell in cells):
            rows.append([f"{name}, AUROC", *[plain(cell) for cell in cells]])
    if not rows:
        return []
    head = ["Reading", *[f"Layer {layer}" for layer in layers]]
    caption = (
        f"Every reading at the final token, {arm}, with 95% intervals; floor: range without a change of behaviour."
    )
    return [Table(caption, head, rows, folded=True, view={"arm": arm})]


def _range(floor: Any, digits: int) -> str:
    if not isinstance(floor, dict) or floor.get("low") is None or floor.get("high") is None:
        return MISSING
    return f"[{floor['low']:.{digits}f}, {floor['high']:.{digits}f}]".replace("-", "\u2212")


def _floor_note(floor: dict[str, Any]) -> str:
    if not floor.get("n"):
        return ""
    kinds: dict[str, int] = {}
    for update in floor.get("updates") or []:
        kinds[str(update.get("kind"))] = kinds.get(str(update.get("kind")), 0) + 1
    mix = ", ".join(f"{many} × {kind}" for kind, many in kinds.items())
    spurned = f"; {floor['rejected']} more changed behaviour and were left out" if floor.get("rejected") else ""
    return (
        f"Noise floor from {floor['n']} updates that change no behaviour" + (f" ({mix})" if mix else "") + spurned + "."
    )
