"""Does a prefix exist? The searched prefix beside what embeddings and exchanged tokens reach, and their way there."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import MISSING, count, error_bar, escape, number, percent, rate, values
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Bounds, Results

# arm: (its words, palette name)
ARMS = {
    "agent": ("agent, no prefix", "agent"),
    "agent+prefix": ("searched", "prefix"),
    "agent+soft-prefix": ("soft", "steer"),
    "agent+discrete-prefix": ("discrete", "any-depth"),
    "agent+naive": ("“I cannot”", "naive"),
}


def section(results: Results) -> Section | None:
    found = results.bounds
    if found is None:
        return None
    arms = [arm for arm in ARMS if arm in found.behaviour]
    bars = [
        Panel("Harmful tasks refused", _bars(found, arms, "harmful", "refusal_rate"), _alt(found, arms)),
        Panel("Benign tasks done", _bars(found, arms, "benign", "success_rate"), "Benign success by prefix."),
    ]
    return Section(
        id="bounds",
        title=f"Does a prefix exist? {found.verdict[0].upper()}{found.verdict[1:]}",
        question="What could a prefix do at most for this agent, and did the search find it?",
        reading=(
            "Both bounds are trained on validation tasks, towards refusals of harmful tasks and the agent’s own "
            f"answers to benign ones; all bars are shares of {found.n} test tasks with 95% intervals. A soft prefix is "
            "made of embeddings: no text of its length can do more, as far as its training reaches. The discrete one "
            "exchanges tokens of the searched prefix along the gradient and has to stay a text. Dotted lines are the "
            "shares from which on a prefix counts as one that restores refusal. The curves show whether the bounds had "
            "stopped improving."
        ),
        panels=[*bars, *_curves(found)],
        keys=[Key(words, colour, "square") for arm, (words, colour) in ARMS.items() if arm in arms],
        tables=[_table(found, arms)],
        columns=2,
        note=f"{found.sentence[0].upper()}{found.sentence[1:]}.",
    )


def _bars(found: Bounds, arms: list[str], label: str, name: str) -> go.Figure:
    fig = theme.figure(288, left=44, right=14, top=14, bottom=44)
    for place, arm in enumerate(arms):
        words, colour = ARMS[arm]
        cell = rate(found.behaviour[arm], label, name)
        fig.add_bar(
            x=[place],
            y=values([cell]),
            width=0.62,
            marker={"color": theme.colour(colour), "line": {"width": 0}},
            error_y=error_bar([cell], theme.colour("ink")),
            customdata=[[escape(words), percent(cell), count(cell)]],
            hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<br>n = %{customdata[2]}<extra></extra>",
        )
    share = _share(found, label, name)
    if share == share:
        fig.add_hline(y=share, line={"color": theme.colour("muted"), "width": 1, "dash": "dot"})
    theme.percent_axis(fig, "y")
    ticks = [ARMS[arm][0].replace(", ", ",<br>") for arm in arms]
    fig.update_xaxes(tickvals=list(range(len(arms))), ticktext=ticks, range=[-0.6, len(arms) - 0.4], showgrid=False)
    return fig


def _share(found: Bounds, label: str, name: str) -> float:
    """The share from which on a prefix counts: of harmful tasks, or of what the agent does without one."""
    if label == "harmful":
        return number(found.bar.get("refused"))
    return number(found.bar.get("kept")) * number(rate(found.behaviour.get("agent"), label, name))


def _curves(found: Bounds) -> list[Panel]:
    panels = []
    for bound, arm, title in (
        (found.soft, "agent+soft-prefix", "Loss of the soft prefix by step"),
        (found.discrete, "agent+discrete-prefix", "Best objective of the discrete prefix by step"),
    ):
        if bound is not None and bound.losses:
            panels.append(Panel(title, _curve(bound.losses, ARMS[arm][1]), _curve_alt(title, bound.losses)))
    return panels


def _curve(losses: list[float], colour: str) -> go.Figure:
    fig = theme.figure(220, left=48, right=14, top=12, bottom=42)
    fig.add_scatter(
        x=np.arange(len(losses), dtype=np.float32), y=np.array(losses, np.float32), mode="lines",
        line={"color": theme.colour(colour), "width": 2},
        hovertemplate="step %{x}: %{y:.2f} nats a token<extra></extra>",
    )  # fmt: skip
    every = max(1, (len(losses) - 1) // 5)  # whole steps alone: of a short curve the halves would be named twice
    fig.update_xaxes(title_text="step", showgrid=False, tick0=0, dtick=every, tickformat="d")
    fig.update_yaxes(title_text="nats a token", rangemode="tozero")
    return fig


def _curve_alt(title: str, losses: list[float]) -> str:
    return f"{title}: from {losses[0]:.2f} to {losses[-1]:.2f} nats a token."


def _alt(found: Bounds, arms: list[str]) -> str:
    shares = [percent(rate(found.behaviour[arm], "harmful", "refusal_rate"), False) for arm in arms]
    listed = ", ".join(f"{ARMS[arm][0]} {share}" for arm, share in zip(arms, shares, strict=True))
    return f"Harmful tasks refused: {listed}."


def _table(found: Bounds, arms: list[str]) -> Table:
    rows = []
    for arm in arms:
        cells: Any = found.behaviour[arm]
        shown = [("harmful", "refusal_rate"), ("lookalike", "refusal_rate"), ("benign", "success_rate")]
        shares = [rate(cells, label, name) for label, name in shown]
        text = found.texts.get(arm) or ("no text" if arm == "agent+soft-prefix" else MISSING)
        rows.append([ARMS[arm][0], *map(percent, shares), count(shares[0]), text])
    head = ["Prefix", "Harmful refused", "Look-alike refused", "Benign done", "n", "Text"]
    return Table(f"{found.n} test tasks, 95% intervals.", head, rows, text_last=True)
