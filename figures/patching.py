"""Where restoring the other model's state moves the refusal: layer by role, both ways, with the control beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import escape, number, percent, plain, sort_layers, values
from pingscope.figures.section import Control, Panel, Section, Table
from pingscope.schema import Results

DIRECTIONS = {"denoise": "base’s state into the agent", "noise": "agent’s state into the base"}
SHOWN = {"share": "Same prompt", "control": "A benign prompt", "neutral": "Its own, of a benign prompt"}


def section(results: Results) -> Section | None:
    patching = results.patching or {}
    maps = patching.get("maps") or {}
    if not maps:
        return None
    panels, tables = [], []
    for direction, words in DIRECTIONS.items():
        cells = (maps.get(direction) or {}).get("harmful") or {}
        if not cells:
            continue
        view = {"direction": direction}
        layers = sort_layers(cells)
        for name, title in SHOWN.items():
            if any(name in cell for by_role in cells.values() for cell in by_role.values()):
                panels.append(Panel(title, _map(cells, layers, name), f"{title}: {words}, log-odds moved.", view))
        tables.append(_table(cells, layers, words, view))
        tables += _outcomes(patching, direction, words, view)
    reference = patching.get("reference") or {}
    note = "; ".join(
        f"{model}: harmful {plain(cell.get('harmful'))}, benign {plain(cell.get('benign'))}"
        for model, cell in reference.items()
    )
    return Section(
        id="patching",
        title="Where the state decides",
        question="If the other model’s state is put in at one layer and place, does its decision come along?",
        reading=(
            "Each cell replaces the residual stream after one layer (row) at the tokens of one role (column) by the "
            "other model’s on the same harmful prompt. 100% means that the patched model’s refusal log-odds "
            "arrive where the other model’s are; 0% that nothing moved. Two controls beside it: the other model’s "
            "state on a random benign prompt (does any state of that model do it?), and the patched model’s own state "
            "on another random benign prompt (does any ordinary state do it?). Dots mark cells above 0 after false "
            "discovery control over the whole map."
        ),
        panels=panels,
        controls=(Control("direction", "Put the", tuple(DIRECTIONS.items()), next(iter(DIRECTIONS))),),
        tables=tables,
        columns=3 if len(panels) == len(SHOWN) * len(DIRECTIONS) else 2,
        note=f"Refusal log-odds without a patch. {note}." if note else "",
    )


def _map(cells: dict[str, Any], layers: list[str], name: str) -> go.Figure:
    columns = list(cells[layers[0]])
    grid = np.array([values((cells[l].get(c) or {}).get(name) for c in columns) for l in layers])
    words = [
        [_percent(cells[l].get(c), name) for c in columns]
        for l in layers
    ]  # fmt: skip
    size = 30 if len(layers) <= 16 else 16
    fig = theme.figure(size * len(layers) + 90, left=52, right=4, top=6, bottom=78)
    fig.add_heatmap(
        z=grid,
        x=list(range(len(columns))),
        y=list(range(len(layers))),
        zmin=-1,
        zmax=1,
        zmid=0,
        colorscale=theme.DIVERGING,
        showscale=False,
        xgap=1.5,
        ygap=1.5,
        text=words,
        texttemplate="%{text}" if len(layers) <= 16 else "",
        textfont={"size": 11, "color": theme.colour("ink")},
        customdata=[[[escape(c), escape(l), percent((cells[l].get(c) or {}).get(name))] for c in columns]
                    for l in layers],
        hovertemplate="layer %{customdata[1]}, %{customdata[0]}: %{customdata[2]}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=[escape(c) for c in columns], tickangle=-45, showgrid=False
    )
    fig.update_yaxes(
        tickvals=list(range(len(layers))), ticktext=[escape(l) for l in layers], autorange="reversed", showgrid=False
    )
    return fig


def _percent(cell: Any, name: str) -> str:
    value = number((cell or {}).get(name))
    if np.isnan(value):
        return "–"
    found = name == "share" and (cell.get("q") is not None and cell["q"] <= 0.05)
    return f"{round(100 * value) + 0:d}".replace("-", "\u2212") + ("•" if found else "")


def _table(cells: dict[str, Any], layers: list[str], words: str, view: dict[str, str]) -> Table:
    rows = [
        [layer, role, *(percent(cell.get(name)) for name in SHOWN), plain(cell.get("moved"))]
        for layer in layers
        for role, cell in cells[layer].items()
    ]
    head = ["Layer", "Place", "Moved, of the difference", "From a benign prompt", "Own, from a benign prompt",
            "Moved, log-odds"]  # fmt: skip
    return Table(
        f"Every cell, {words}, harmful prompts, 95% intervals.", head, rows, folded=True, text_columns=2, view=view
    )


def _outcomes(patching: dict[str, Any], direction: str, words: str, view: dict[str, str]) -> list[Table]:
    cells = (patching.get("outcome") or {}).get(direction) or {}
    rows = [
        [layer, place, *(percent((cell.get(label) or {}).get(kind)) for label, kind in _KINDS)]
        for layer in sort_layers(cells)
        for place, cell in cells[layer].items()
    ]
    head = ["Layer", "Place", "Harmful refused", "… from a benign prompt", "Benign refused"]
    caption = f"What the first turn then says, {words}: refusals as judged, 95% intervals."
    return [Table(caption, head, rows, text_columns=2, view=view)] if rows else []


_KINDS = (("harmful", "refusal_rate"), ("harmful", "control"), ("benign", "refusal_rate"))
