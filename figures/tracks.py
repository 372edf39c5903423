"""The safety logit along the prompt: curves aligned by role, one panel an arm, and the gap between harm and not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import curve
from pingscope.figures.numbers import MISSING, escape, plain, sort_layers
from pingscope.figures.section import Control, Key, Panel, Section, Table, layer_control
from pingscope.schema import Curve, Estimate, Results

ROLES = ("system", "instruction", "page", "suffix", "template", "header", "prefix", "response")
# Few header tokens carry the story: they get as much room as a long page.
WIDTHS = {
    "system": 8,
    "instruction": 10,
    "page": 10,
    "suffix": 8,
    "template": 6,
    "header": 8,
    "prefix": 12,
    "response": 8,
}
WIDEST_SLOT = 2.5
ALIGNMENTS = {"fraction": "tenths", "index": "tokens"}
TEXT_ROLES = ("system", "instruction", "page", "suffix")


def section(results: Results) -> Section | None:
    curves = results.curves or {}
    tracks = results.tracks or {}
    if not curves and not tracks:
        return None
    arms = theme.sort_arms(list(curves or tracks))
    layers = sort_layers({layer for arm in arms for layer in (curves or tracks)[arm]})
    start = layers[-1]
    labels = [label for label in theme.LABELS if any(label in cell for arm in curves.values() for cell in arm.values())]
    panels, keys, controls = [], [], layer_control(layers, start)
    if curves:
        views = [by for by in ALIGNMENTS if by == "fraction" or _has(curves, "instruction", by)]
        if len(views) > 1:
            controls += (Control("by", "Instruction by", tuple((by, ALIGNMENTS[by]) for by in views), views[0]),)
        for by in views:
            panels += _panels(_aligned(curves, by), arms, labels, layers, start, {"by": by} if len(views) > 1 else {})
        marks = {"harmful": "line", "lookalike": "dotted", "benign": "dash"}
        keys = [Key(f"{theme.LABELS[label]} prompts", label, marks[label]) for label in labels]
    return Section(
        id="tracks",
        title="The safety signal along the prompt",
        question="Where in the prompt does the model read harm, and is it still there when it starts to speak?",
        reading=(
            "The probe’s logit on each token, averaged over prompts, with a 95% band; positive means harmful. Texts "
            "are cut into tenths (the instruction, if you choose so, token by token up to its 32nd), chat markup and "
            "prefix are shown token by token, and the header is drawn wide: its last token (ringed), or the prefix’s "
            "last, is where the model starts to speak. Levels differ between positions for reasons unrelated to harm, "
            "so compare lines at the same place, not one place with another. Bands widen and lines end where few or "
            "no prompts have such a token."
        ),
        panels=panels,
        controls=controls,
        keys=keys,
        tables=[_table(tracks, layer) for layer in layers] if tracks else [],
    )


def _has(curves: dict[str, Any], role: str, by: str) -> bool:
    cells = (cell for arm in curves.values() for layer in arm.values() for cell in layer.values())
    return any((role, by) in zip(cell.role, cell.by or (), strict=False) for cell in cells)


def _aligned(curves: dict[str, Any], by: str) -> dict[str, Any]:
    """The curves with texts that are known both ways aligned ``by`` one of them."""
    other = {"fraction": "index", "index": "fraction"}[by]

    def kept(cell: Curve) -> Curve:
        if cell.by is None:
            return cell
        ways = list(zip(cell.role, cell.by, strict=True))
        both = {role for role, way in ways if way == by and role in TEXT_ROLES}
        rows = [i for i, (role, way) in enumerate(ways) if role not in both or way != other]
        columns = {name: column for name, column in cell if column is not None}
        return cell.model_copy(update={name: [column[i] for i in rows] for name, column in columns.items()})

    return {
        arm: {layer: {label: kept(cell) for label, cell in cells.items()} for layer, cells in by_layer.items()}
        for arm, by_layer in curves.items()
    }


def _panels(
    curves: dict[str, Any], arms: list[str], labels: list[str], layers: list[str], start: str, view: dict[str, str]
) -> list[Panel]:
    axis, ranges = _axis(curves), _ranges(curves)
    panels = []
    for arm in arms:
        alt = f"Safety logit by position on {', '.join(theme.LABELS[l] for l in labels)} prompts, {arm}."
        panels.append(Panel(arm, _arm(curves[arm], labels, layers, start, axis, ranges), alt, view, wide=True))
    if any("gap" in cells for arm in curves.values() for cells in arm.values()):
        alt = "Harmful minus benign logit by position, one line an arm."
        arm_keys = [Key(arm, theme.arm_key(arm), theme.arm_mark(arm)) for arm in arms]
        fig = _gap(curves, arms, layers, start, axis)
        panels.append(Panel("Harmful minus benign", fig, alt, view, wide=True, keys=arm_keys))
    return panels


def _axis(curves: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """role → (left edge, width of a slot, number of slots), for the roles that any curve has."""
    slots: dict[str, int] = {}
    for cell in (cell for arm in curves.values() for layer in arm.values() for cell in layer.values()):
        for role, many in zip(cell.role, cell.slots, strict=True):
            slots[role] = max(slots.get(role, 1), int(many))
    axis, left = {}, 0.0
    for role in [r for r in ROLES if r in slots] + sorted(set(slots) - set(ROLES)):
        width = min(WIDTHS.get(role, 8) / slots[role], WIDEST_SLOT)
        axis[role] = (left, width, slots[role])
        left += width * slots[role]
    return axis


def _columns(cell: Curve, axis: dict[str, Any]) -> dict[str, np.ndarray]:
    """Numeric columns with x, broken (NaN) between roles so that no line joins two of them."""
    rows: list[tuple[float, float, float, float]] = []
    last = None
    for role, slot, value, low, high in zip(cell.role, cell.slot, cell.value, cell.low, cell.high, strict=True):
        left, width, _ = axis[role]
        if last not in (None, role):
            rows.append((left, math.nan, math.nan, math.nan))
        last = role
        rows.append((left + (slot + 0.5) * width, *(math.nan if v is None else float(v) for v in (value, low, high))))
    table = np.array(rows, np.float32).reshape(-1, 4)
    return dict(zip(("x", "value", "low", "high"), table.T, strict=True))


def _details(cell: Curve) -> list[list[str]]:
    out: list[list[str]] = []
    last = None
    ways = cell.by or ["fraction" if role in TEXT_ROLES else "index" for role in cell.role]
    for index, (role, by, slot, slots) in enumerate(zip(cell.role, ways, cell.slot, cell.slots, strict=True)):
        if last not in (None, role):
            out.append(["", "", ""])
        last = role
        place = f"tenth {slot + 1} of {slots}" if by == "fraction" else f"token {slot + 1} of {slots}"
        ends = (cell.low[index], cell.high[index])
        estimate = Estimate(value=cell.value[index], ci=None if None in ends else ends)
        out.append([f"{escape(role)}, {place}", plain(estimate), str(cell.n[index]) if cell.n else MISSING])
    return out


def _frame(axis: dict[str, Any], height: int) -> go.Figure:
    fig = theme.figure(height, left=44, right=12, top=24, bottom=10)
    end = 0.0
    for index, (role, (left, width, slots)) in enumerate(axis.items()):
        end = left + width * slots
        if index % 2 == 0:
            fig.add_vrect(x0=left, x1=end, fillcolor=theme.colour("band"), line_width=0, layer="below")
        fig.add_annotation(
            x=(left + end) / 2, y=1, yref="paper", yanchor="bottom", text=escape(role), showarrow=False,
            font={"size": 11, "color": theme.colour("muted")}, name="role",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": theme.colour("muted"), "width": 1}, layer="below")
    fig.update_xaxes(range=[0, end], showgrid=False, showticklabels=False, ticks="")
    fig.update_yaxes(nticks=5)
    return fig


def _ranges(curves: dict[str, Any]) -> dict[str, list[float]]:
    """layer → one vertical range for every arm, so that panels can be compared by eye."""
    ends: dict[str, list[float]] = {}
    for arm in curves.values():
        for layer, labels in arm.items():
            for cell in (cell for label, cell in labels.items() if label != "gap"):
                columns = (*cell.value, *cell.low, *cell.high)
                ends.setdefault(layer, [0.0]).extend(v for v in columns if v is not None and not math.isnan(v))
    reach = {layer: (max(found) - min(found)) or 1.0 for layer, found in ends.items()}
    return {l: [min(found) - 0.06 * reach[l], max(found) + 0.06 * reach[l]] for l, found in ends.items()}


def _arm(
    arm: dict[str, Any],
    labels: list[str],
    layers: list[str],
    start: str,
    axis: dict[str, Any],
    ranges: dict[str, list[float]],
) -> go.Figure:
    fig = _frame(axis, 230)
    fig.update_layout(meta={"ranges": ranges}, yaxis_range=ranges.get(start))
    for layer in layers:
        view: dict[str, Any] = {"meta": {"layer": layer}, "visible": layer == start}
        for label in labels:
            cell = (arm.get(layer) or {}).get(label)
            if not cell or not cell.role:
                continue
            columns = _columns(cell, axis)
            curve(
                fig, columns["x"], columns["value"], columns["low"], columns["high"], colour=label,
                dash=theme.DASHES[label], symbol=theme.SYMBOLS[label], size=4.5, width=1.8,
                hover=f"<b>{theme.LABELS[label]}: %{{customdata[1]}}</b><br>%{{customdata[0]}}, n = %{{customdata[2]}}",
                details=_details(cell), **view,
            )  # fmt: skip
            _final_token(fig, columns, label, view)
    return fig


def _final_token(fig: go.Figure, columns: dict[str, np.ndarray], tint: str, view: dict[str, Any]) -> None:
    known = np.flatnonzero(~np.isnan(columns["value"]))
    if len(known):
        fig.add_scatter(
            x=columns["x"][known[-1:]], y=columns["value"][known[-1:]], mode="markers", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 13, "color": theme.colour(tint), "line": {"width": 1.6}},
            cliponaxis=False, **view,
        )  # fmt: skip


def _gap(curves: dict[str, Any], arms: list[str], layers: list[str], start: str, axis: dict[str, Any]) -> go.Figure:
    fig = _frame(axis, 250)
    for layer in layers:
        view: dict[str, Any] = {"meta": {"layer": layer}, "visible": layer == start}
        for arm in arms:
            gap = (curves[arm].get(layer) or {}).get("gap")
            if not gap or not gap.role:
                continue
            columns = _columns(gap, axis)
            name = theme.arm_key(arm)
            curve(
                fig, columns["x"], columns["value"], columns["low"], columns["high"], colour=name, size=4.5, width=2,
                dash=theme.ARM_DASHES.get(arm, "solid"),
                hover=f"<b>{escape(arm)}: %{{customdata[1]}}</b><br>%{{customdata[0]}}, n = %{{customdata[2]}}",
                details=_details(gap), **view,
            )  # fmt: skip
            _final_token(fig, columns, name, view)
    return fig


def _table(tracks: dict[str, Any], layer: str) -> Table:
    found = {role for arm in tracks.values() for label in (arm.get(layer) or {}).values() for role in label}
    roles = [r for r in (*ROLES, "prompt", "final") if r in found]
    rows = []
    for arm in theme.sort_arms(list(tracks)):
        cells = tracks[arm].get(layer) or {}
        for label in [l for l in theme.LABELS if l in cells]:
            rows.append([arm, theme.LABELS[label], *[plain(cells[label].get(role), 1, True) for role in roles]])
    head = ["Arm", "Prompts", *[{"prompt": "whole prompt", "final": "final token"}.get(r, r) for r in roles]]
    caption = f"Mean safety logit by role at layer {layer}, with 95% intervals."
    return Table(caption, head, rows, folded=True, text_columns=2, view={"layer": layer})
