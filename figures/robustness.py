"""A prefix beside guards, under attack, and in other models."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import error_bar, escape, number, percent, plain, values
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Results

COLUMNS = (
    ("harmful refused", "harmful", "refusal_rate"),
    ("harmful done", "harmful", "attack_success_rate"),
    ("benign done", "benign", "success_rate"),
    ("benign refused", "benign", "refusal_rate"),
    ("look-alikes refused", "lookalike", "refusal_rate"),
)


def section(results: Results) -> Section | None:
    guards, attacks, transfer = results.guards or {}, results.attacks or {}, results.transfer or {}
    if not (guards or attacks or transfer):
        return None
    panels, tables = [], []
    for found, title in ((guards, "Guards, the prefix, and both"), (attacks, "The prefix under attack")):
        if found:
            panels.append(Panel(title, _arms(found["behaviour"]), f"{title}: harmful refused and benign done by arm."))
            tables.append(_rates(title, found["behaviour"]))
    if guards:
        rows = [[name, *(str(said[k]) for k in ("harmful", "safe", "unparseable"))] for name, said in
                guards["verdicts"].items()]  # fmt: skip
        head = ["Guard", "Blocked", "Let through", "Answer unreadable, let through"]
        tables.append(Table("What the guards said of the tasks.", head, rows, folded=True))
    if transfer:
        tables += [_matrix(transfer), _transferred(transfer)]
    return Section(
        id="robustness",
        title="How far the prefix carries",
        question="What does a guard add, what does an attacker take away, and does the prefix work elsewhere?",
        reading=(
            "A guard blocks a request before the agent acts; the prefix leaves the decision to the agent. Stripping "
            "asks the agent to drop its comment, or cuts it; the jailbreak puts the agent’s own harmful answers before "
            "the task. Compare each attacked arm with the same arm unattacked."
        ),
        panels=panels,
        keys=[Key("harmful refused", "prefix", "dot"), Key("benign done", "base", "square")] if panels else [],
        tables=tables,
        columns=min(2, max(1, len(panels))),
    )


def _arms(behaviour: dict[str, Any]) -> go.Figure:
    arms = list(behaviour)
    fig = theme.figure(26 * len(arms) + 62, left=190, right=20, top=8, bottom=44)
    for (title, label, name), colour, symbol, shift in (
        (COLUMNS[0], "prefix", "circle", -0.14),
        (COLUMNS[2], "base", "square", 0.14),
    ):
        cells = [behaviour[arm].get(label, {}).get("strict", {}).get(name) for arm in arms]
        fig.add_scatter(
            x=values(cells), y=[i + shift for i in range(len(arms))], mode="markers",
            marker={"color": theme.colour(colour), "symbol": symbol, "size": 9},
            error_x=error_bar(cells, theme.colour(colour)),
            customdata=[[escape(arm), percent(cell)] for arm, cell in zip(arms, cells, strict=True)],
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>{title}: %{{customdata[1]}}<extra></extra>",
        )  # fmt: skip
    theme.percent_axis(fig)
    fig.update_xaxes(title_text="tasks")
    fig.update_yaxes(
        tickvals=list(range(len(arms))), ticktext=[escape(arm) for arm in arms], range=[len(arms) - 0.5, -0.5],
        showgrid=False, tickfont={"color": theme.colour("ink"), "size": 12},
    )  # fmt: skip
    return fig


def _rates(title: str, behaviour: dict[str, Any]) -> Table:
    shown = [c for c in COLUMNS if any(c[1] in rates for rates in behaviour.values())]
    rows = [
        [arm, *(percent(rates.get(label, {}).get("strict", {}).get(name)) for _, label, name in shown)]
        for arm, rates in behaviour.items()
    ]
    head = ["Arm", *(title[0].upper() + title[1:] for title, _, _ in shown)]
    return Table(f"{title}, 95% intervals.", head, rows, folded=True)


def _transferred(transfer: dict[str, Any]) -> Table:
    """What stands behind the scores: a prefix that refuses everything, or only confuses, is seen as such."""
    rows = [
        [model, "no prefix" if source == "none" else source]
        + [percent(cell["behaviour"].get(label, {}).get("strict", {}).get(name)) for _, label, name in COLUMNS]
        for model, row in transfer["matrix"].items()
        for source, cell in row.items()
    ]
    head = ["Model", "Prefix of", *(title[0].upper() + title[1:] for title, _, _ in COLUMNS)]
    return Table("Rates behind the scores, 95% intervals.", head, rows, text_columns=2)


def _matrix(transfer: dict[str, Any]) -> Table:
    sources = ["none", *transfer["prefixes"]]
    rows = []
    for model, row in transfer["matrix"].items():
        best = max((number(row[s]["overall"]) for s in sources if s in row), default=0.0)
        cells = [plain(row[s]["overall"]) + (" ●" if number(row[s]["overall"]) == best else "") for s in sources]
        rows.append([model, *cells])
    return Table(
        "Overall score (harmful refused plus benign not refused) of every model with every model’s prefix, 95% "
        "intervals; ● the model’s best.",
        ["Model", "No prefix", *transfer["prefixes"]],
        rows,
    )
