"""The same text in two places: as the start of the answer (prefix) against the end of the prompt (suffix)."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import count, error_bar, escape, number, percent, rate, values, wrap
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import InjectedArm, Results

ROW = 52
PAIR = {"prefix": ("prefix", "circle", 0.1), "suffix": ("suffix", "circle-open", 0.28)}  # palette name, mark, offset


def section(results: Results) -> Section | None:
    arms = results.injection or {}
    if not arms:
        return None
    rows = _rows(arms)
    panels = []
    if rows:
        panels = [
            Panel("Harmful tasks refused", _pairs(rows, "harmful", "refusal_rate"), _alt(rows)),
            Panel("Benign tasks done", _pairs(rows, "benign", "success_rate"), "Benign success by text and place."),
        ]
    return Section(
        id="injection",
        title="Prefix against suffix",
        question="Does it matter where the text stands?",
        reading=(
            "Each row is one text. The filled mark is the text as the start of the model’s own answer, the ring the "
            "same text at the end of the user’s prompt; the line between them is the effect of the place alone. "
            "Neutral texts of the same length show what any comment would do."
        ),
        panels=panels,
        keys=[
            Key("as prefix of the answer", "prefix", "dot"),
            Key("as suffix of the prompt", "suffix", "ring"),
            Key("elsewhere", "other", "diamond"),
        ],
        tables=[_table(arms)],
        columns=2,
    )


def _rows(arms: dict[str, InjectedArm]) -> list[tuple[str, str, list[tuple[str, InjectedArm]]]]:
    """(text, name, [(kind, arm)]) for each text and model, in order of appearance; arms without text have no row."""
    grouped: dict[tuple[str, str], list[tuple[str, InjectedArm]]] = {}
    names: dict[tuple[str, str], str] = {}
    for arm, cell in arms.items():
        if not cell.text:
            continue
        model = cell.model or arm.partition("+")[0]
        grouped.setdefault((cell.text, model), []).append((cell.kind, cell))
        names.setdefault((cell.text, model), f"{model}, {cell.name or arm.partition('+')[2] or arm}")
    return [(text, names[text, model], kinds) for (text, model), kinds in grouped.items()]


def _pairs(rows: list[Any], label: str, name: str) -> go.Figure:
    fig = theme.figure(ROW * len(rows) + 44, left=14, right=22, top=26, bottom=8)
    for row, (text, title, kinds) in enumerate(rows):
        points = [number(rate(cell.rates, label, name)) for _, cell in kinds]
        real = [point for point in points if point == point]
        if len(real) > 1:
            fig.add_shape(
                type="line", x0=min(real), x1=max(real), y0=row + 0.19, y1=row + 0.19,
                line={"color": theme.colour("rule"), "width": 5}, layer="below",
            )  # fmt: skip
        for kind, cell in kinds:
            tint, symbol, offset = PAIR.get(kind, ("other", "diamond", 0.19))
            value = rate(cell.rates, label, name)
            fig.add_scatter(
                x=values([value]),
                y=[row + offset],
                mode="markers",
                marker={
                    "color": theme.colour(tint),
                    "symbol": symbol,
                    "size": 10,
                    "line": {"width": 2, "color": theme.colour(tint)},
                },
                error_x=error_bar([value], theme.colour(tint)),
                customdata=[[escape(kind), wrap(text), percent(value), count(value)]],
                hovertemplate=(
                    "<b>%{customdata[0]}: %{customdata[2]}</b>, n = %{customdata[3]}<br>%{customdata[1]}<extra></extra>"
                ),
                cliponaxis=False,
            )
        fig.add_annotation(
            x=0, xref="paper", y=row - 0.24, xanchor="left", yanchor="middle", showarrow=False,
            text=f"<b>{escape(title, 26)}</b>  {escape(text, 40)}", align="left",
            font={"size": 11.5, "color": theme.colour("muted")},
        )  # fmt: skip
        fig.add_hline(y=row + 0.5, line={"color": theme.colour("grid"), "width": 1}, layer="below")
    theme.percent_axis(fig)
    fig.update_xaxes(side="top")
    fig.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, showticklabels=False)
    return fig


def _alt(rows: list[Any]) -> str:
    parts = []
    for _, title, kinds in rows:
        shares = ", ".join(f"{kind} {percent(rate(c.rates, 'harmful', 'refusal_rate'), False)}" for kind, c in kinds)
        parts.append(f"{title}: {shares}")
    return "Harmful tasks refused. " + "; ".join(parts) + "."


def _table(arms: dict[str, InjectedArm]) -> Table:
    rows = []
    for arm in theme.sort_arms(list(arms)):
        cell = arms[arm]
        harmful = rate(cell.rates, "harmful", "refusal_rate")
        look, benign = rate(cell.rates, "lookalike", "refusal_rate"), rate(cell.rates, "benign", "success_rate")
        words = [arm, cell.kind or "–", cell.text or "–"]
        rows.append([*words, percent(harmful), percent(look), percent(benign), count(harmful)])
    head = ["Arm", "Place", "Text", "Harmful refused", "Look-alike refused", "Benign done", "n"]
    return Table("Every text, with 95% intervals.", head, rows, folded=bool(len(rows) > 8), text_columns=3)
