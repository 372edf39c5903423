"""Safety against usefulness: one point an arm, harmful refusal over benign success, over-refusal as the mark."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.numbers import MISSING, count, error_bar, escape, number, percent, rate, values
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Rates, Results

# Share of look-alike tasks refused, up to which a mark is used: (limit, plotly symbol, key's mark, words).
MARKS = (
    (0.05, "circle", "dot", "refuses at most 5% of look-alikes"),
    (0.5, "circle-open", "ring", "5 to 50%"),
    (1.0, "diamond", "diamond", "more than half"),
)
NEAR = 0.035  # labels of points closer than this are written as one


def section(results: Results) -> Section | None:
    behaviour = _steered(results) | (results.behaviour or {})
    arms = [arm for arm in theme.sort_arms(list(behaviour)) if _point(behaviour, arm) is not None]
    if len(arms) < 3:
        return None
    front = pareto_front({arm: _point(behaviour, arm) for arm in arms})  # type: ignore[misc]
    used = {_mark(behaviour, arm) for arm in arms}
    return Section(
        id="pareto",
        title="Safety against usefulness",
        question="Which arm refuses harm and still does its work?",
        reading=(
            "Each mark is an arm: the further up, the more harmful tasks it refuses; the further right, the more "
            "benign tasks it carries out; the top right corner is the goal. The mark tells how many look-alikes it "
            "refuses though they are benign. The line joins the arms that no other arm beats in both. Numbers are "
            "those of the table; lines through the marks are 95% intervals."
        ),
        panels=[
            Panel(
                "Harmful tasks refused over benign tasks done", _figure(behaviour, arms, front), _alt(behaviour, arms)
            )
        ],
        keys=[Key(words, "ink", mark) for limit, _, mark, words in MARKS if limit in used],
        tables=[_table(results, behaviour, arms, front)],
    )


def _steered(results: Results) -> dict[str, Rates]:
    """The chosen point of a steering study as an arm."""
    chosen = results.steering_chosen or {}
    cell = (results.steering or {}).get("add", {}).get(chosen.get("layers"), {}).get(chosen.get("dose"))
    return {"agent+steer": cell} if cell else {}


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The arms that no other arm equals or beats in both coordinates and beats in one, from left to right."""
    kept = [
        arm
        for arm, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for other, (a, b) in points.items() if other != arm)
    ]
    return sorted(kept, key=lambda arm: points[arm])


def _point(behaviour: dict[str, Rates], arm: str) -> tuple[float, float] | None:
    cell = behaviour[arm]
    x, y = number(rate(cell, "benign", "success_rate")), number(rate(cell, "harmful", "refusal_rate"))
    return None if x != x or y != y else (x, y)


def _mark(behaviour: dict[str, Rates], arm: str) -> float:
    over = number(rate(behaviour[arm], "lookalike", "refusal_rate"))
    return next((limit for limit, *_ in MARKS if not over > limit), MARKS[-1][0])


def _figure(behaviour: dict[str, Rates], arms: list[str], front: list[str]) -> go.Figure:
    fig = theme.figure(430, left=56, right=24, top=16, bottom=50)
    line = [_point(behaviour, arm) for arm in front]
    fig.add_scatter(
        x=[p[0] for p in line if p], y=[p[1] for p in line if p], mode="lines", hoverinfo="skip",
        line={"color": theme.colour("rule"), "width": 2},
    )  # fmt: skip
    symbols = {limit: symbol for limit, symbol, *_ in MARKS}
    for arm in arms:
        cell = behaviour[arm]
        done, refused = rate(cell, "benign", "success_rate"), rate(cell, "harmful", "refusal_rate")
        over = rate(cell, "lookalike", "refusal_rate")
        tint = theme.arm_colour(arm)
        fig.add_scatter(
            x=values([done]),
            y=values([refused]),
            mode="markers",
            marker={
                "color": tint,
                "symbol": symbols[_mark(behaviour, arm)],
                "size": 11,
                "line": {"width": 2, "color": tint},
            },
            error_x=error_bar([done], theme.arm_colour(arm, 0.45)),
            error_y=error_bar([refused], theme.arm_colour(arm, 0.45)),
            customdata=[[escape(arm), percent(refused), percent(done), percent(over), count(refused)]],
            hovertemplate=(
                "<b>%{customdata[0]}</b><br>harmful refused: %{customdata[1]}<br>benign done: %{customdata[2]}"
                "<br>look-alikes refused: %{customdata[3]}<br>n = %{customdata[4]}<extra></extra>"
            ),
            cliponaxis=False,
        )
    for (x, y), numbers in _labels(behaviour, arms):
        fig.add_annotation(
            x=x, y=y, text=numbers, showarrow=False, xshift=-10 if x > 0.5 else 10, yshift=-13 if y > 0.5 else 13,
            xanchor="right" if x > 0.5 else "left", font={"size": 11, "color": theme.colour("muted")},
        )  # fmt: skip
    theme.percent_axis(fig)
    theme.percent_axis(fig, "y")
    fig.update_xaxes(title_text="benign tasks done")
    fig.update_yaxes(title_text="harmful tasks refused")
    return fig


def _labels(behaviour: dict[str, Rates], arms: list[str]) -> list[tuple[tuple[float, float], str]]:
    """Numbers beside the marks; those of marks that lie together in one label."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for i, arm in enumerate(arms, 1):
        point = np.array(_point(behaviour, arm))
        near = next((group for group in groups if np.abs(group[0] - point).max() < NEAR), None)
        if near is None:
            groups.append((point, [i]))
        else:
            near[1].append(i)
    return [((float(x), float(y)), ", ".join(map(str, numbers))) for (x, y), numbers in groups]


def _alt(behaviour: dict[str, Rates], arms: list[str]) -> str:
    parts = []
    for arm in arms:
        done, refused = _point(behaviour, arm) or (0.0, 0.0)
        parts.append(f"{arm} {100 * refused:.0f}% and {100 * done:.0f}%")
    return "Harmful tasks refused and benign tasks done: " + "; ".join(parts) + "."


def _table(results: Results, behaviour: dict[str, Rates], arms: list[str], front: list[str]) -> Table:
    paired = results.paired or {}
    fired = (results.gates or {}).get("fired") or {}
    rows = []
    for i, arm in enumerate(arms, 1):
        cell = behaviour[arm]
        wanted = [("harmful", "refusal_rate"), ("benign", "success_rate"), ("lookalike", "refusal_rate")]
        cells = [rate(cell, label, name) for label, name in wanted]
        change = rate(paired.get(arm) or {}, "benign", "success_rate")
        moved = number(change)
        opened = fired.get(arm) or {}
        rows.append(
            [
                f"{i}  {arm}" + (" *" if arm in front else ""),
                *[percent(one) for one in cells],
                MISSING if moved != moved else f"{100 * moved:+.1f}".replace("-", "\u2212"),
                " / ".join(percent(opened.get(label), False) for label in theme.LABELS) if opened else MISSING,
                count(cells[0]),
            ]
        )
    head = ["Arm", "Harmful refused", "Benign done", "Look-alike refused", "Benign done, against the agent (points)"]
    head += ["Gate opened: harmful / look-alike / benign", "n"]
    return Table("The arms by number, with 95% intervals; * no other arm beats it in both.", head, rows, folded=True)
