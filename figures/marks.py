"""Curves with interval bands, the one mark that several figures share."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme


def band(fig: go.Figure, x: np.ndarray, low: np.ndarray, high: np.ndarray, tint: str, **view: Any) -> None:
    """Shade between ``low`` and ``high``. Runs are closed polygons, so a missing interval leaves a true gap."""
    known = ~(np.isnan(low) | np.isnan(high) | np.isnan(x))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        run = slice(start, stop)
        xs += [x[run], x[run][::-1], np.array([np.nan])]
        ys += [high[run], low[run][::-1], np.array([np.nan])]
    if xs:
        fig.add_scatter(
            x=np.concatenate(xs[:-1]).astype(np.float32),
            y=np.concatenate(ys[:-1]).astype(np.float32),
            mode="lines",
            line={"width": 0, "color": tint},
            fill="toself",
            fillcolor=tint,
            hoverinfo="skip",
            **view,
        )


def curve(
    fig: go.Figure,
    x: np.ndarray,
    y: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str,
    hover: str,
    details: list[list[str]],
    dash: str = "solid",
    symbol: str = "circle",
    size: float = 7,
    width: float = 2,
    **view: Any,
) -> None:
    """A line with its band. ``colour`` is a palette name, ``hover`` a template over ``details`` (customdata)."""
    band(fig, x, low, high, theme.colour(colour, 0.15), **view)
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": theme.colour(colour), "width": width, "dash": dash},
        marker={"color": theme.colour(colour), "size": size, "symbol": symbol},
        customdata=details,
        hovertemplate=hover + "<extra></extra>",
        cliponaxis=False,
        **view,
    )
