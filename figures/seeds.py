"""Every seed's rates by arm: one row an arm, one dot a seed, a tick at the median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import plotly.graph_objects as go

from pingscope.figures import theme

ROW = 30
COLUMNS = ("harmful refused", "benign done", "look-alikes refused")

Arms = Mapping[str, Mapping[str, float | None]]  # arm → column → a fraction


def seeds_page(seeds: Mapping[str, Arms]) -> str:
    """A page of its own, offline, from the rates of every seed by its name."""
    return str(seeds_figure(seeds).to_html(include_plotlyjs=True, config=theme.CONFIG))


def seeds_figure(seeds: Mapping[str, Arms]) -> go.Figure:
    """Panels side by side, rows in the house's order of arms; seeds lie apart within a row, in their order."""
    arms = theme.sort_arms(list(dict.fromkeys(arm for found in seeds.values() for arm in found)))
    fig = theme.figure(ROW * len(arms) + 80, left=230, top=44)
    width, style = 1 / len(COLUMNS), fig.layout.xaxis.to_plotly_json()
    for panel, column in enumerate(COLUMNS):
        axis = f"x{panel + 1}" if panel else "x"
        fig.update_layout(
            {axis.replace("x", "xaxis", 1): style | {
                "domain": [panel * width, (panel + 0.92) * width], "range": [-0.03, 1.03],
                "tickvals": [0, 0.5, 1], "ticktext": ["0", "50", "100%"],
                "title": style.get("title", {}) | {"text": column}, "side": "top",
            }}
        )  # fmt: skip
        for row, arm in enumerate(arms):
            _dots(fig, axis, row, arm, {seed: found.get(arm, {}).get(column) for seed, found in seeds.items()})
    fig.update_yaxes(
        tickvals=list(range(len(arms))), ticktext=arms, range=[len(arms) - 0.5, -0.5], showgrid=False, zeroline=False
    )
    return fig


def _dots(fig: go.Figure, axis: str, row: int, arm: str, values: Mapping[str, float | None]) -> None:
    known = {seed: value for seed, value in values.items() if value is not None}
    if not known:
        return
    apart = [row + 0.5 * (i / max(len(known) - 1, 1) - 0.5) for i in range(len(known))]
    fig.add_scatter(
        x=list(known.values()), y=apart, xaxis=axis, yaxis="y", mode="markers", cliponaxis=False,
        marker={"color": theme.arm_colour(arm, 0.75), "size": 8}, customdata=list(known),
        hovertemplate=f"{arm}, seed %{{customdata}}: %{{x:.0%}}<extra></extra>",
    )  # fmt: skip
    middle = statistics.median(known.values())
    fig.add_scatter(
        x=[middle, middle], y=[row - 0.38, row + 0.38], xaxis=axis, yaxis="y", mode="lines", cliponaxis=False,
        line={"color": theme.arm_colour(arm), "width": 2}, hoverinfo="skip",
    )  # fmt: skip
