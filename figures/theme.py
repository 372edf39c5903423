"""Colours, marks and type shared by every figure: one hue per arm, one hue per kind of task, light and dark.

Figures are built in the light palette; the page maps every light colour to its dark partner when the reader's
system (or the toggle) asks for it, so each light colour must be unique. Hues are told apart under the common kinds
of colour blindness, and colour is never the only sign: marks differ in shape, lines in dash.
"""

from __future__ import annotations

import plotly.graph_objects as go

# name: (light, dark)
PALETTE: dict[str, tuple[str, str]] = {
    "surface": ("#ffffff", "#15181c"),
    "raised": ("#f7f6f3", "#1c2025"),
    "ink": ("#1c2127", "#e9e7e2"),
    "muted": ("#5d656e", "#a0a8b1"),
    "rule": ("#dddbd5", "#343a42"),
    "grid": ("#ebe9e4", "#272c33"),
    "start": ("#c9ced4", "#4a525c"),
    "band": ("#f2f0eb", "#1f2429"),
    # kinds of task; harmful and benign are also the two ends of the safety logit's scale
    "harmful": ("#b5342b", "#f08074"),
    "lookalike": ("#a67a0c", "#e0b84c"),
    "benign": ("#2b6cb0", "#74aef0"),
    "control": ("#8d949c", "#858d97"),
    # ends of the heat maps, pale (or deep) enough for the printed numbers to stay readable on them
    "hot": ("#e89488", "#9a443b"),
    "cold": ("#8ab6e6", "#2e629f"),
    "high": ("#a9b7c8", "#4c5a6b"),
    "low": ("#e3c678", "#7d6120"),
    # arms: each lever has a hue, its control a paler tint of it
    "base": ("#3d4856", "#c3ccd6"),
    "agent": ("#cf5f0b", "#ff9d57"),
    "prefix": ("#0b7a70", "#45c4b6"),
    "neutral-prefix": ("#74aaa4", "#6f9f99"),
    "gated-prefix": ("#064e58", "#8fdcd6"),
    "suffix": ("#a5508c", "#e08fc8"),
    "system": ("#7b6a2e", "#c9b568"),
    "fewshot": ("#5e7f2a", "#a7cc6b"),
    "naive": ("#80482c", "#cf9678"),
    "steer": ("#5748ad", "#a79bf2"),
    "random-steer": ("#a39cc9", "#837cb0"),
    "gated-steer": ("#2d2575", "#c9c2ff"),
    "cast": ("#8c3f6b", "#d68fb3"),
    "any-depth": ("#2f6b3a", "#7fbf8c"),
    "other": ("#6d7681", "#98a1ab"),
}

ARM_ORDER = (
    "base", "base+neutral-prefix", "base+prefix", "agent", "agent+prefix", "agent+gated-prefix", "agent+suffix",
    "agent+system", "agent+fewshot", "agent+naive", "agent+neutral-prefix", "agent+shuffled-prefix", "agent+steer",
    "agent+gated-steer", "agent+cast", "agent+any-depth", "agent+random-steer",
)  # fmt: skip
LABELS = {"harmful": "harmful", "lookalike": "look-alike", "benign": "benign"}
SYMBOLS = {"harmful": "circle", "lookalike": "diamond", "benign": "square"}
DASHES = {"harmful": "solid", "lookalike": "dot", "benign": "dash"}
ARM_DASHES = {"base": "solid", "agent": "dash", "agent+prefix": "dot"}

SANS = '-apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,Inter,"Helvetica Neue","Liberation Sans",Arial,sans-serif'
CONFIG = {"displayModeBar": False, "responsive": True, "scrollZoom": False, "doubleClick": False, "showTips": False}


def colour(name: str, opacity: float = 1.0) -> str:
    """The light colour of a palette name, as hex, or rgba when it is not opaque."""
    light = PALETTE[name][0]
    if opacity == 1:
        return light
    red, green, blue = (int(light[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def arm_key(arm: str) -> str:
    """The palette name of an arm; an arm the house does not know gets the neutral ``other``."""
    model, _, lever = arm.partition("+")
    lever = {"shuffled-prefix": "neutral-prefix", "suffix-bare": "suffix", "paper-steer": "random-steer"}.get(
        lever, lever
    )
    if model == "base":
        return "base"
    name = lever or model
    return name if name in PALETTE else "other"


def arm_colour(arm: str, opacity: float = 1.0) -> str:
    return colour(arm_key(arm), opacity)


def arm_mark(arm: str) -> str:
    """The key's mark for an arm drawn as a line."""
    return {"solid": "line", "dash": "dash", "dot": "dotted"}[ARM_DASHES.get(arm, "solid")]


def sort_arms(arms: list[str]) -> list[str]:
    """House order first, then the rest as they came."""
    known = [arm for arm in ARM_ORDER if arm in arms]
    return known + [arm for arm in arms if arm not in known]


def dark_partners() -> dict[str, str]:
    """Light ``#rrggbb`` to dark ``#rrggbb``, as the page's script uses it."""
    return dict(PALETTE.values())


def css_variables(dark: bool) -> str:
    return "".join(f"--{name}:{pair[dark]};" for name, pair in PALETTE.items())


# AUROC: 0.5 is colourless, high is sober ink (not alarming red), below chance stands out.
AREA = [[0, colour("low")], [0.5, colour("surface")], [1, colour("high")]]
DIVERGING = [[0, colour("cold")], [0.5, colour("surface")], [1, colour("hot")]]


def figure(height: int, *, left: int = 44, right: int = 16, top: int = 16, bottom: int = 40) -> go.Figure:
    """An empty figure in the house style. Margins in pixels; titles and legends live in the page, not in the plot."""
    axis = {
        "gridcolor": colour("grid"),
        "linecolor": colour("rule"),
        "tickcolor": colour("rule"),
        "zeroline": False,
        "fixedrange": True,
        "automargin": False,
        "tickfont": {"color": colour("muted"), "size": 11.5},
        "title": {"font": {"color": colour("muted"), "size": 12}, "standoff": 8},
    }
    return go.Figure(
        layout={
            "template": {"layout": {}},
            "height": height,
            "autosize": True,
            "margin": {"l": left, "r": right, "t": top, "b": bottom, "pad": 4},
            "font": {"family": SANS, "size": 12, "color": colour("ink")},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "showlegend": False,
            "dragmode": False,
            "hovermode": "closest",
            "hoverlabel": {
                "bgcolor": colour("surface"),
                "bordercolor": colour("rule"),
                "font": {"family": SANS, "size": 12, "color": colour("ink")},
                "align": "left",
                "namelength": 0,
            },
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def percent_axis(fig: go.Figure, which: str = "x") -> None:
    """Rates are fractions; the axis reads them as percentages from 0 to 100."""
    update = fig.update_xaxes if which == "x" else fig.update_yaxes
    update(range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1], ticktext=["0", "25", "50", "75", "100%"])
