"""What the model is about to say first: probability mass of refusal, action and comment starts."""

from __future__ import annotations

from pingscope.figures import theme
from pingscope.figures.numbers import escape, number, percent, values
from pingscope.figures.section import Control, Key, Panel, Section
from pingscope.schema import Results

# Shades of ink: the hues are taken by kinds of task and by arms.
STARTS = {
    "refusal": ("ink", "surface"),
    "comment": ("other", "surface"),
    "action": ("start", "ink"),
    "other": ("band", "ink"),
}


def section(results: Results) -> Section | None:
    mass = results.first_token or {}
    if not mass:
        return None
    arms = theme.sort_arms(list(mass))
    labels = [label for label in theme.LABELS if any(label in mass[arm] for arm in arms)]
    fig = theme.figure(30 * len(arms) + 50, left=8, right=20, top=26, bottom=8)
    for label in labels:
        for start, (tint, words) in STARTS.items():
            cells = [(mass[arm].get(label) or {}).get(start) for arm in arms]
            fig.add_bar(
                x=values(cells),
                y=list(range(len(arms))),
                orientation="h",
                width=0.56,
                marker={"color": theme.colour(tint), "line": {"width": 1, "color": theme.colour("rule")}},
                text=[percent(cell, False) if number(cell) >= 0.12 else "" for cell in cells],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                constraintext="none",
                textfont={"color": theme.colour(words), "size": 11.5},
                customdata=[[escape(arm), percent(cell)] for arm, cell in zip(arms, cells, strict=True)],
                hovertemplate=f"<b>%{{customdata[0]}}</b><br>{start}: %{{customdata[1]}}<extra></extra>",
                meta={"label": label},
                visible=label == labels[0],
            )
    theme.percent_axis(fig)
    fig.update_layout(barmode="stack")
    fig.update_xaxes(side="top", range=[0, 1])
    fig.update_yaxes(
        tickvals=list(range(len(arms))),
        ticktext=[escape(arm, 28) for arm in arms],
        range=[len(arms) - 0.5, -0.5],
        showgrid=False,
        automargin=True,
        tickfont={"color": theme.colour("ink"), "size": 12.5},
    )
    options = tuple((label, theme.LABELS[label]) for label in labels)
    return Section(
        id="first-token",
        title="The first token",
        question="What is the model about to say when it opens its mouth?",
        reading=(
            "Each bar is the mean probability of the next token at the decision, split by what that token begins: "
            "a refusal, a comment, an action, or anything else."
        ),
        panels=[Panel("Mass of the first token", fig, "First-token probability by class and arm.", wide=True)],
        controls=(Control("label", "Tasks", options, labels[0]),) if len(labels) > 1 else (),
        keys=[Key(start, tint, "square") for start, (tint, _) in STARTS.items()],
    )
