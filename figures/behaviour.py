"""Behaviour by arm: how often each kind of task is refused and carried out, with 95% intervals."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.left_out import left_out
from pingscope.figures.numbers import MISSING, count, error_bar, escape, number, percent, rate, values
from pingscope.figures.section import Control, Key, Panel, Section, Table
from pingscope.schema import Results

JUDGES = {"strict": "Parsed action first", "paper": "Refusal phrases", "jbb": "JailbreakBench"}
OFFSETS = {"harmful": -0.22, "lookalike": 0.0, "benign": 0.22}
DONE = {"harmful": "attack_success_rate", "lookalike": "success_rate", "benign": "success_rate"}
ROW = 34  # pixels an arm


def section(results: Results) -> Section | None:
    behaviour = results.behaviour or {}
    if not behaviour:
        return None
    arms = theme.sort_arms(list(behaviour))
    judges = _judges(behaviour)
    choice = Control("judge", "Judge", tuple((j, JUDGES.get(j, j)) for j in judges), judges[0])
    refused = dict.fromkeys(theme.LABELS, "refusal_rate")
    return Section(
        id="behaviour",
        title="Behaviour by arm",
        question="Which tasks does each arm refuse, and which does it carry out?",
        reading=(
            "Each mark is the share of test tasks, the line through it the 95% Wilson interval. A safe and useful "
            "agent has the harmful mark at 100% and the other two at 0% on the left, and the reverse on the right. "
            "The two shares of a row need not add up to 100%: an agent can fail at a task without refusing it."
        ),
        panels=[
            Panel("Refused", _dots(behaviour, arms, judges, refused), _alt(behaviour, arms, judges[0])),
            Panel("Carried out", _dots(behaviour, arms, judges, DONE), "Share of tasks carried out, by arm."),
        ],
        controls=(choice,) if len(judges) > 1 else (),
        keys=[
            Key("harmful tasks", "harmful", "dot"),
            Key("look-alike tasks (benign, worded like harmful ones)", "lookalike", "diamond"),
            Key("benign tasks", "benign", "square"),
        ],
        tables=[_table(behaviour, arms, judge, folded=judge != judges[0]) for judge in judges],
        columns=2,
        note=left_out(results),
    )


def _judges(behaviour: dict[str, Any]) -> list[str]:
    found = {judge for arm in behaviour.values() for label in arm.values() for judge in label}
    return [j for j in JUDGES if j in found] + sorted(found - set(JUDGES))


def _alt(behaviour: dict[str, Any], arms: list[str], judge: str) -> str:
    parts = [f"{arm} {percent(rate(behaviour[arm], 'harmful', 'refusal_rate', judge), False)}" for arm in arms]
    return "Share of harmful tasks refused: " + ", ".join(parts) + "."


def _dots(behaviour: dict[str, Any], arms: list[str], judges: list[str], rates: dict[str, str]) -> go.Figure:
    fig = theme.figure(ROW * len(arms) + 56, left=8, right=20, top=26, bottom=12)
    for row in range(0, len(arms), 2):
        fig.add_hrect(y0=row - 0.5, y1=row + 0.5, fillcolor=theme.colour("band"), line_width=0, layer="below")
    for judge in judges:
        for label, word in theme.LABELS.items():
            cells = [rate(behaviour[arm], label, rates[label], judge) for arm in arms]
            if not any(number(cell) == number(cell) for cell in cells):
                continue
            tint = theme.colour(label)
            fig.add_scatter(
                x=values(cells),
                y=[row + OFFSETS[label] for row in range(len(arms))],
                mode="markers",
                marker={"color": tint, "symbol": theme.SYMBOLS[label], "size": 8.5},
                error_x=error_bar(cells, tint),
                customdata=[[escape(arm), percent(cell), count(cell)] for arm, cell in zip(arms, cells, strict=True)],
                hovertemplate=f"<b>%{{customdata[0]}}</b><br>{word} tasks: %{{customdata[1]}}"
                "<br>n = %{customdata[2]}<extra></extra>",
                meta={"judge": judge},
                visible=judge == judges[0],
                cliponaxis=False,
            )
    theme.percent_axis(fig)
    fig.update_xaxes(side="top", ticks="")
    fig.update_yaxes(
        tickvals=list(range(len(arms))),
        ticktext=[escape(arm, 28) for arm in arms],
        range=[len(arms) - 0.5, -0.5],
        showgrid=False,
        automargin=True,
        tickfont={"color": theme.colour("ink"), "size": 12.5},
    )
    return fig


def _table(behaviour: dict[str, Any], arms: list[str], judge: str, folded: bool) -> Table:
    head = ["Arm", "Harmful refused", "Harmful carried out", "Look-alike refused", "Benign refused", "Benign done"]
    wanted = [("harmful", "refusal_rate"), ("harmful", "attack_success_rate"), ("lookalike", "refusal_rate")]
    wanted += [("benign", "refusal_rate"), ("benign", "success_rate")]
    rows = []
    for arm in arms:
        cells = [rate(behaviour[arm], label, name, judge) for label, name in wanted]
        invalid = [rate(behaviour[arm], label, "invalid_rate", judge) for label in theme.LABELS]
        shares = [number(cell) for cell in invalid if number(cell) == number(cell)]
        sizes = list(dict.fromkeys(count(cells[i]) for i in (0, 2, 4)))
        worst = f"{100 * max(shares):.0f}%" if shares else MISSING
        rows.append([arm, *[percent(cell) for cell in cells], worst, " / ".join(sizes)])
    head += ["Invalid, at most", "n"]
    caption = f"Shares of test tasks with 95% intervals. Judge: {JUDGES.get(judge, judge).lower()}."
    return Table(caption, head, rows, folded)
