"""Along a fine-tuning run, at every checkpoint: behaviour, the final token's gap, and what prefixes still do."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import curve
from pingscope.figures.numbers import bounds, count, escape, number, percent, plain, rate, sort_layers, values
from pingscope.figures.section import Key, Panel, Section, Table, layer_control
from pingscope.schema import Results, Step

CURVES = (("harmful", "refusal_rate"), ("lookalike", "refusal_rate"), ("benign", "success_rate"))
PREFIXES = {"agent+prefix": "the agent’s prefix", "agent+naive": "“I cannot”"}
WORDS = {"harmful": "harmful tasks refused", "lookalike": "look-alike tasks refused", "benign": "benign tasks done"}


def section(results: Results) -> Section | None:
    points = sorted(results.dose_response or [], key=lambda point: point.step)
    if not points:
        return None
    layers = sort_layers({layer for point in points for layer in point.gap or {}})
    start = layers[-1] if layers else ""
    panels = [Panel("Behaviour", _behaviour(points), "Refusal and success against fine-tuning steps.")]
    arms = [arm for arm in PREFIXES if any(arm in (point.prefixed or {}) for point in points)]
    if arms:
        panels += [
            Panel(title, _prefixed(points, arms, label, name), f"{title} behind each prefix against fine-tuning steps.")
            for title, label, name in (
                ("Harmful refused behind a prefix", "harmful", "refusal_rate"),
                ("Benign done behind a prefix", "benign", "success_rate"),
            )
        ]
    if layers:
        panels.append(Panel("Gap at the final token", _gap(points, layers, start), "Gap against fine-tuning steps."))
    return Section(
        id="fine-tuning",
        title="Along the fine-tuning",
        question="Does the signal at the final token fall as the refusals do?",
        reading=(
            "Each point is a checkpoint of one run; step 0 is the base. The gap is the mean safety logit on harmful "
            "tasks minus that on benign tasks at the last token before the model speaks. The dotted upright marks "
            "the checkpoint used as the agent in this report."
            + " Every checkpoint is also given the prefix that was found for the agent, and “I cannot”."
            * bool(arms)
        ),
        panels=panels,
        controls=layer_control(layers, start),
        keys=[
            Key(WORDS["harmful"], "harmful", "line"),
            Key(WORDS["lookalike"], "lookalike", "dotted"),
            Key(WORDS["benign"], "benign", "dash"),
            *(Key(PREFIXES[arm], theme.arm_key(arm), theme.arm_mark(arm)) for arm in arms),
        ],
        tables=[_table(points, layers, arms), *(_readings(points, layer) for layer in layers if _known(points, layer))],
        columns=2,
    )


READINGS = (
    ("Raw, harmful, prompt", "raw", "prompt", "harmful"),
    ("Raw, harmful", "raw", "final", "harmful"),
    ("Gap", "contrast", "final", "gap"),
    ("AUROC", "contrast", "final", "auroc"),
    ("Shift, harmful", "shift", "final", "harmful"),
    ("Placed probe AUROC", "placed", "final", "auroc"),
    ("Transfer AUROC", "placed", "final", "transfer_auroc"),
    ("Realigned gap", "realigned", "final", "gap"),
)


def _known(points: list[Step], layer: str) -> bool:
    return any((point.readings or {}).get(layer) for point in points)


def _readings(points: list[Step], layer: str) -> Table:
    """The five readings at every checkpoint, one layer."""
    rows = []
    for name, reading, position, leaf in READINGS:
        cells = [
            ((((point.readings or {}).get(layer) or {}).get(reading) or {}).get(position) or {}).get(leaf)
            for point in points
        ]
        rows.append([name, *[plain(cell) for cell in cells]])
    head = ["Reading", *[f"Step {point.step}" for point in points]]
    caption = f"Every reading along the fine-tuning, layer {layer}, at the final token unless said, 95% intervals."
    return Table(caption, head, rows, folded=True, view={"layer": layer})


def _steps(points: list[Step]) -> np.ndarray:
    return np.array([point.step for point in points], np.float32)


def _frame(points: list[Step]) -> go.Figure:
    fig = theme.figure(300, left=52, right=18, top=12, bottom=46)
    fig.update_xaxes(title_text="fine-tuning step", showgrid=False)
    for point in points:
        if point.chosen:
            fig.add_vline(x=point.step, line={"color": theme.colour("muted"), "width": 1, "dash": "dot"})
    return fig


def _behaviour(points: list[Step]) -> go.Figure:
    fig = _frame(points)
    for label, name in CURVES:
        cells = [rate(point.behaviour, label, name) for point in points]
        curve(
            fig,
            _steps(points),
            values(cells),
            *bounds(cells),
            colour=label,
            dash=theme.DASHES[label],
            symbol=theme.SYMBOLS[label],
            hover=f"{WORDS[label]}: %{{customdata[0]}}<br>step %{{x}}, n = %{{customdata[1]}}",
            details=[[percent(cell), count(cell)] for cell in cells],
        )
    theme.percent_axis(fig, "y")
    return fig


def _gap(points: list[Step], layers: list[str], start: str) -> go.Figure:
    fig = _frame(points)
    for layer in layers:
        cells = [(point.gap or {}).get(layer) for point in points]
        curve(
            fig,
            _steps(points),
            values(cells),
            *bounds(cells),
            colour="ink",
            hover=f"layer {escape(layer)}: %{{customdata[0]}}<br>step %{{x}}, n = %{{customdata[1]}}",
            details=[[plain(cell), count(cell)] for cell in cells],
            meta={"layer": layer},
            visible=layer == start,
        )
    fig.update_yaxes(title_text="harmful − benign, logits", rangemode="tozero")
    return fig


def _prefixed(points: list[Step], arms: list[str], label: str, name: str) -> go.Figure:
    fig = _frame(points)
    for arm in arms:
        cells = [rate((point.prefixed or {}).get(arm), label, name) for point in points]
        curve(
            fig,
            _steps(points),
            values(cells),
            *bounds(cells),
            colour=theme.arm_key(arm),
            dash=theme.ARM_DASHES.get(arm, "solid"),
            hover=f"{PREFIXES[arm]}: %{{customdata[0]}}<br>step %{{x}}, n = %{{customdata[1]}}",
            details=[[percent(cell), count(cell)] for cell in cells],
        )
    theme.percent_axis(fig, "y")
    return fig


def _table(points: list[Step], layers: list[str], arms: list[str]) -> Table:
    rows = []
    for point in points:
        shares = [percent(rate(point.behaviour, label, name)) for label, name in CURVES]
        gaps = [plain(number((point.gap or {}).get(layer)), 1) for layer in layers]
        behind = [
            percent(rate((point.prefixed or {}).get(arm), label, name))
            for arm in arms
            for label, name in (("harmful", "refusal_rate"), ("benign", "success_rate"))
        ]
        rows.append([str(point.step) + (" (agent)" if point.chosen else ""), *shares, *behind, *gaps])
    head = ["Step", "Harmful refused", "Look-alike refused", "Benign done"]
    head += [f"{what} behind {PREFIXES[arm]}" for arm in arms for what in ("Harmful refused", "Benign done")]
    head += [f"Gap, layer {l}" for l in layers]
    return Table("Every checkpoint.", head, rows, folded=True)
