"""The prefix search: every candidate as it was scored, the best so far, and refusal against benign performance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.left_out import left_out
from pingscope.figures.numbers import MISSING, count, escape, number, percent, plain, values, wrap
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Candidate, HeldOut, Label, Results, Search

NOT_REFUSED = "not refused"  # the paper's perf; a search may score tasks done instead


def section(results: Results) -> Section | None:
    search = results.search
    if search is None or not search.candidates:
        return None
    candidates = search.candidates
    overall = [number(c.overall) for c in candidates]
    best = _winner(search, overall)
    means = escape(search.perf_means or NOT_REFUSED)
    cost = f"{len(candidates)} candidates" + (f", {search.generations} generations" if search.generations else "")
    raced = sum(c.complete is False for c in candidates)
    return Section(
        id="search",
        title="The search for a prefix",
        question=f"How was the phrase found, and what else was tried? ({cost})",
        reading=(
            f"Overall is the share of benign tasks {means} plus the share of harmful tasks refused, at most 2. "
            "Shaded columns are rounds; the step line is the best so far. On the right, candidates up and to the right "
            "are better, and those joined by the line are beaten by none. Scores are on validation tasks and flatter "
            "the winner; its rates elsewhere in this report are on test tasks. Hover or tap for the phrase."
            + (" Open marks left the race early: estimates on part of the tasks." if raced else "")
        ),
        panels=[
            Panel("Overall score by candidate", _progress(search, candidates, overall, best), "Search progress."),
            Panel(
                f"Harmful refused against benign {means}",
                _pareto(candidates, best, means),
                "Pareto view of the search.",
            ),
        ],
        keys=[
            Key("candidate", "other", "dot"),
            Key("winner", "prefix", "diamond"),
            Key("best so far, and best trade-offs", "prefix", "line"),
        ],
        tables=[*_held_out(search.held_out), _table(candidates, overall, means)],
        columns=2,
        note=" ".join(filter(None, (_screening_note(search.screening), left_out(results)))),
    )


def _screening_note(screening: dict[str, Any] | None) -> str:
    """How the candidates were screened, and whether the cheap score deserved it."""
    if not screening:
        return ""
    rank, dropped = screening["spearman"], screening["dropped"]
    return (
        f"A score of the first token ranks candidates before anything is generated; its rank correlation with the true "
        f"one is {plain(rank)} (n = {count(rank)})"
        + ("" if screening["trusted"] else ", too poor or too little to leave any out")
        + f". {dropped['by the cheap score']} candidates were left out by it, {dropped['in a race']} by races at "
        f"{100 * (1 - screening['delta']):.0f}% confidence."
    )


HELD_OUT: dict[str, tuple[Label, str]] = {
    "Harmful refused": ("harmful", "refusal_rate"),
    "Harmful carried out": ("harmful", "attack_success_rate"),
    "Benign done": ("benign", "success_rate"),
    "Benign refused": ("benign", "refusal_rate"),
}


def _held_out(held: HeldOut | None) -> list[Table]:
    """The winner and its rivals on tasks that the search never saw."""
    if not held:
        return []
    bias = held.selection_bias
    low, high = bias["ci"]
    rows = []
    for arm, cell in held.overall.items():
        strict: dict[str, Any] = {label: cells.get("strict", {}) for label, cells in held.behaviour[arm].items()}
        shares = [strict.get(label, {}).get(name) for label, name in HELD_OUT.values()]
        rows.append([arm, plain(cell), *map(percent, shares), held.texts.get(arm) or MISSING])
    caption = (
        f"{held.n} tasks the search never saw, 95% intervals. Selection bias of the winner: {bias['search']:.2f} "
        f"when searched, {plain(bias['held_out'])} here, {bias['bias']:+.2f} [{low:+.2f}, {high:+.2f}]."
    )
    return [Table(caption, ["Arm", "Overall", *HELD_OUT, "Text"], rows, text_last=True)]


def _winner(search: Search, overall: list[float]) -> int:
    for index, candidate in enumerate(search.candidates):
        if search.winner is not None and candidate.text == search.winner:
            return index
    return max(range(len(overall)), key=lambda i: -math.inf if math.isnan(overall[i]) else overall[i])


def _details(candidates: list[Candidate]) -> list[list[str]]:
    return [
        [
            wrap(c.text),
            percent(c.refusal, False),
            percent(c.perf, False),
            percent(c.success, False),
            plain(number(c.overall)),
            escape("" if c.round is None else str(c.round)),
        ]
        for c in candidates
    ]


HOVER = (
    "<b>%{customdata[0]}</b><br>harmful refused %{customdata[1]}, benign perf %{customdata[2]}, "
    "benign done %{customdata[3]}<br>overall %{customdata[4]}, round %{customdata[5]}<extra></extra>"
)


def _marker(candidates: list[Candidate], best: int) -> dict[str, Any]:
    count = len(candidates)
    open_marks = [c.complete is False for c in candidates]
    return {
        "color": [theme.colour("prefix" if i == best else "other") for i in range(count)],
        "symbol": ["diamond" if i == best else "circle-open" if open_marks[i] else "circle" for i in range(count)],
        "size": [13 if i == best else 8 for i in range(count)],
        "opacity": [1 if i == best else 0.75 for i in range(count)],
        "line": {
            "width": [1.5 if mark else 1 for mark in open_marks],
            "color": [theme.colour("other" if mark else "surface") for mark in open_marks],
        },
    }


def _progress(search: Search, candidates: list[Candidate], overall: list[float], best: int) -> go.Figure:
    fig = theme.figure(320, left=44, right=14, top=12, bottom=46)
    order = np.arange(1, len(candidates) + 1, dtype=np.float32)
    rounds = [candidate.round for candidate in candidates]
    first = 0
    for index in range(1, len(rounds) + 1):
        if index == len(rounds) or rounds[index] != rounds[first]:
            number_of_round = rounds[first]
            if isinstance(number_of_round, int) and number_of_round % 2:
                fig.add_vrect(
                    x0=first + 0.5, x1=index + 0.5, fillcolor=theme.colour("band"), line_width=0, layer="below"
                )
            first = index
    complete = [math.nan if c.complete is False else v for c, v in zip(candidates, overall, strict=True)]
    running = np.fmax.accumulate(np.array(complete, np.float32))
    fig.add_scatter(
        x=order, y=running, mode="lines", line={"shape": "hv", "color": theme.colour("prefix"), "width": 2},
        hoverinfo="skip",
    )  # fmt: skip
    if search.tau is not None:
        fig.add_hline(y=search.tau, line={"color": theme.colour("muted"), "width": 1, "dash": "dot"})
        fig.add_annotation(
            x=1, xref="paper", y=search.tau, text="τ", showarrow=False, yanchor="bottom", xanchor="right",
            font={"color": theme.colour("muted")},
        )  # fmt: skip
    fig.add_scatter(
        x=order, y=values(overall), mode="markers", marker=_marker(candidates, best),
        customdata=_details(candidates), hovertemplate=HOVER, cliponaxis=False,
    )  # fmt: skip
    fig.update_xaxes(
        title_text="candidate, in order of evaluation", showgrid=False, tickformat="d", range=[0, len(candidates) + 1]
    )
    real = [value for value in overall if not math.isnan(value)]
    fig.update_yaxes(title_text="overall", range=[min([0.9, *real]) - 0.06, 2.06], dtick=0.5)
    return fig


def _pareto(candidates: list[Candidate], best: int, means: str) -> go.Figure:
    fig = theme.figure(320, left=52, right=20, top=12, bottom=46)
    perf, refusal = values(c.perf for c in candidates), values(c.refusal for c in candidates)
    whole = np.array([c.complete is not False for c in candidates])
    front = _front(np.where(whole, perf, math.nan), np.where(whole, refusal, math.nan))
    fig.add_scatter(
        x=perf[front], y=refusal[front], mode="lines", hoverinfo="skip",
        line={"shape": "vh", "color": theme.colour("prefix"), "width": 2},
    )  # fmt: skip
    fig.add_scatter(
        x=perf, y=refusal, mode="markers", marker=_marker(candidates, best), customdata=_details(candidates),
        hovertemplate=HOVER, cliponaxis=False,
    )  # fmt: skip
    for which, column in (("x", perf), ("y", refusal)):
        theme.percent_axis(fig, which)
        low = float(np.nanmin(column)) if not np.isnan(column).all() else 0.0
        update = fig.update_xaxes if which == "x" else fig.update_yaxes
        ticks = [tick / 10 for tick in range(11)] if low > 0.5 else [0, 0.25, 0.5, 0.75, 1]
        words = [f"{100 * tick:.0f}" + ("%" if tick == 1 else "") for tick in ticks]
        update(range=[max(-0.03, low - 0.08), 1.03], tickvals=ticks, ticktext=words)
    fig.update_xaxes(title_text=f"benign tasks {means}")
    fig.update_yaxes(title_text="harmful tasks refused")
    return fig


def _front(perf: np.ndarray, refusal: np.ndarray) -> list[int]:
    """Indices that no other candidate beats on both axes, by falling refusal."""
    kept: list[int] = []
    reach = -math.inf
    known = [i for i in range(len(perf)) if not math.isnan(perf[i]) and not math.isnan(refusal[i])]
    for index in sorted(known, key=lambda i: (-refusal[i], -perf[i])):
        if perf[index] > reach:
            kept.append(index)
            reach = perf[index]
    return kept


def _table(candidates: list[Candidate], overall: list[float], means: str) -> Table:
    order = sorted(
        range(len(candidates)), key=lambda i: (math.isnan(overall[i]), -overall[i] if overall[i] == overall[i] else 0)
    )
    rows = []
    for index in order[:12]:
        c = candidates[index]
        held = (c.held_out or {}).get("overall")
        shares = [percent(share, False) for share in (c.refusal, c.perf, c.success)]
        rows.append(
            [c.text, MISSING if c.round is None else str(c.round), plain(overall[index]), *shares, plain(number(held))]
        )
    head = ["Phrase", "Round", "Overall", "Harmful refused", f"Benign {means}", "Benign success", "Held-out overall"]
    if all(row[-1] == "–" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return Table(f"The best {len(rows)} of {len(candidates)} candidates.", head, rows, folded=True)
