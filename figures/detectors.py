"""Detectors at one false-positive rate, side by side, with the words alone as the baseline."""

from __future__ import annotations

from pingscope.figures import theme
from pingscope.figures.numbers import error_bar, percent, plain, values
from pingscope.figures.section import Panel, Section, Table
from pingscope.schema import Results

NAMES = {
    "final": "probe at the final token",
    "mean": "probe of the prompt’s mean",
    "max": "largest token",
    "coherence": "segment coherence",
    "coherence, several layers": "… on several layers",
    "trajectory": "trajectory",
    "trajectory, shuffled tokens": "trajectory, shuffled tokens",
    "words": "bag of words, no activations",
}


def section(results: Results) -> Section | None:
    found = results.detectors or {}
    if not found:
        return None
    models = theme.sort_arms(list(found))
    names = list(found[models[0]]["detectors"])
    panels = []
    for model in models:
        cells = [found[model]["detectors"][name]["tpr"] for name in names]
        fig = theme.figure(30 * len(names) + 62, left=188, right=20, top=8, bottom=44)
        tint = theme.arm_colour(model)
        fig.add_scatter(
            x=values(cells), y=list(range(len(names))), mode="markers", marker={"color": tint, "size": 9},
            error_x=error_bar(cells, tint),
            customdata=[[NAMES.get(name, name), percent(cell)] for name, cell in zip(names, cells, strict=True)],
            hovertemplate="<b>%{customdata[0]}</b>: %{customdata[1]} caught<extra></extra>",
        )  # fmt: skip
        theme.percent_axis(fig)
        fig.update_xaxes(title_text="harmful test tasks caught")
        fig.update_yaxes(
            tickvals=list(range(len(names))), ticktext=[NAMES.get(name, name) for name in names],
            range=[len(names) - 0.5, -0.5], showgrid=False, tickfont={"color": theme.colour("ink"), "size": 12},
        )  # fmt: skip
        alt = f"Harmful tasks caught by each detector, {model}."
        panels.append(Panel(f"{model}, layer {found[model]['layer']}", fig, alt))
    rows = [
        [model, NAMES.get(name, name), *(percent(cell[key]) for key in ("tpr", "fpr", "lookalike_fpr")),
         plain(cell["auroc"]), percent(cell["tpr_at_1fpr"])]
        for model in models
        for name, cell in found[model]["detectors"].items()
    ]  # fmt: skip
    head = [
        "Model",
        "Detector",
        "Caught",
        "Benign flagged",
        "Look-alikes flagged",
        "AUROC",
        "Caught at 1% of the test’s",
    ]
    n = found[models[0]]["n"]
    deep = found[models[0]].get("deep_layers") or []
    return Section(
        id="detectors",
        title="Detectors at a fixed false-positive rate",
        question="Which way of reading the prompt catches harm when one benign task in a hundred may be flagged?",
        reading=(
            "Every detector reads the prompt from the instruction on, is trained on validation tasks and takes its "
            "threshold from other benign validation tasks: at most 1% of them lie above. What it catches, and what it "
            "really lets through, is read on test tasks. A detector that does not beat the words has not shown that "
            "the activations add anything; a trajectory model that does as well on shuffled tokens does not use their "
            "order."
        ),
        panels=panels,
        tables=[Table("Every detector, 95% intervals.", head, rows, folded=True, text_columns=2)],
        columns=min(2, len(panels)),
        note=f"{n['train']} tasks train, {n['selection']} choose layer and threshold, {n['test']} are read."
        + (f" Several layers: {', '.join(deep)}." if deep else ""),
    )
