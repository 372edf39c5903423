"""How good the probes are by layer and pooling, beside their controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from pingscope.figures import theme
from pingscope.figures.marks import curve
from pingscope.figures.numbers import MISSING, bounds, count, escape, plain, sort_layers, values
from pingscope.figures.section import Key, Panel, Section, Table
from pingscope.schema import Results

POOLINGS = {
    "mean_prompt": ("mean of the prompt", "ink", "solid", "circle"),
    "mean_instruction": ("mean of the instruction", "muted", "dash", "square"),
    "final": ("final token", "other", "dot", "diamond"),
}
# measure: its words in the table; the controls are AUROCs
MEASURES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "tpr_at_1fpr": "TPR at 1% FPR",
    "calibration_error": "Calibration error",
    "shuffled_auroc": "Shuffled labels",
    "random_auroc": "Random direction",
    "means_auroc": "Difference of means",
    "means_cosine": "… its cosine",
    "category_auroc": "Held-out categories",
    "category_worst": "… the worst",
    "transfer_auroc": "Transfer",
}


def section(results: Results) -> Section | None:
    probes = results.probes or {}
    if not probes:
        return None
    models = theme.sort_arms(list(probes))
    found = [p for p in POOLINGS if any(p in probes[model] for model in models)]
    marks = {"solid": "line", "dash": "dash", "dot": "dotted"}
    words = results.baselines or {}
    baselines = [
        f"{name.replace('_', ' ')}: text length {plain(b.get('length_auroc'))}, "
        f"tokens {plain(b.get('tokens_auroc'))}, bag of words {plain(b.get('words_auroc'))}"
        for name, b in words.items()
    ]
    return Section(
        id="probes",
        title="Probes",
        question="Can a linear probe read harm at all, and does it read more than chance?",
        reading=(
            "AUROC of each layer’s probe on held-out prompts, with 95% bands. The thin lines are the same probes "
            "trained on shuffled labels: they must stay near 0.5."
        ),
        panels=[Panel(model, _lines(probes[model]), f"Probe AUROC by layer, {model}.") for model in models],
        keys=[
            *[Key(POOLINGS[p][0], POOLINGS[p][1], marks[POOLINGS[p][2]]) for p in found],
            Key("shuffled labels", "control", "line"),
        ],
        tables=[_table(probes, models)],
        columns=min(2, len(models)),
        note=("Baselines that see no activations, AUROC. " + "; ".join(baselines) + ".") if baselines else "",
    )


def _lines(model: dict[str, Any]) -> go.Figure:
    fig = theme.figure(260, left=44, right=14, top=12, bottom=44)
    layers = sort_layers({layer for pooling in model.values() for layer in pooling})
    x = np.arange(len(layers), dtype=np.float32)
    fig.add_hline(y=0.5, line={"color": theme.colour("muted"), "width": 1, "dash": "dot"}, layer="below")
    for pooling, (words, tint, dash, symbol) in POOLINGS.items():
        if pooling not in model:
            continue
        rows = [model[pooling].get(layer) or {} for layer in layers]
        fig.add_scatter(
            x=x, y=values(row.get("shuffled_auroc") for row in rows), mode="lines",
            line={"color": theme.colour("control"), "width": 1.2, "dash": dash},
            hovertemplate=f"{words}, shuffled labels: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        cells = [row.get("auroc") for row in rows]
        curve(
            fig, x, values(cells), *bounds(cells), colour=tint, dash=dash, symbol=symbol, size=6,
            hover=f"{words}: %{{customdata[0]}}<br>layer %{{customdata[1]}}, n = %{{customdata[2]}}",
            details=[[plain(c), escape(l), count(c)] for c, l in zip(cells, layers, strict=True)],
        )  # fmt: skip
    step = max(1, len(layers) // 12)
    fig.update_xaxes(title_text="layer", tickvals=list(x[::step]), ticktext=layers[::step], showgrid=False)
    low = min([0.4, *[v for t in fig.data for v in np.asarray(t.y, float) if not np.isnan(v)]])
    fig.update_yaxes(range=[max(0.0, low - 0.03), 1.03], title_text="AUROC", dtick=0.1)
    return fig


def _table(probes: dict[str, Any], models: list[str]) -> Table:
    rows = []
    for model in models:
        for pooling, layers in probes[model].items():
            for layer in sort_layers(layers):
                cells = [layers[layer].get(name) for name in MEASURES]
                words = POOLINGS.get(pooling, (pooling,))[0]
                rows.append([model, words, layer, *[plain(cell) for cell in cells], count(cells[0])])
    kept = [i for i in range(3 + len(MEASURES)) if i < 3 or any(row[i] != MISSING for row in rows)]
    head = ["Model", "Pooling", "Layer", *MEASURES.values()]
    return Table(
        "Every probe, with 95% intervals.",
        [*[head[i] for i in kept], "n"],
        [[*[row[i] for i in kept], row[-1]] for row in rows],
        folded=True,
        text_columns=2,
    )
