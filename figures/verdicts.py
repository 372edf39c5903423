"""The collapse in words and tables: verdicts by reading, every number at the final token, the noise floor."""

from __future__ import annotations

import math
from typing import Any

from pingscope.figures.numbers import MISSING, number, plain
from pingscope.figures.section import Table

READINGS = {
    "raw": "Raw logit",
    "contrast": "Contrast (harmful minus benign)",
    "shift": "Shift against the base",
    "placed": "Probe trained at the position",
    "transfer": "Base’s probe trained there, read on this arm",
    "realigned": "Base’s probe after a label-free map",
}


def verdict_table(arm: str, cells: dict[str, Any], layers: list[str]) -> list[Table]:
    """One row a reading: at which layers it shows a collapse, at which it does not, and why at the last."""
    rows = []
    for reading, words in READINGS.items():
        said = {l: v for l in layers if (v := ((cells.get(l) or {}).get("verdict") or {}).get(reading))}
        if not said:
            continue
        fallen = [l for l, v in said.items() if v.get("verdict") == "collapse"]
        absent = [l for l in said if l not in fallen]
        last = list(said)[-1]
        reason = f"{last}: {said[last].get('reason')}" if said[last].get("reason") else MISSING
        rows.append([words, _layers("▼", fallen, said), _layers("○", absent, said), reason])
    head = ["Verdict by reading", "▼ Collapse at layers", "○ Absent at layers", "Reason at the last layer"]
    return (
        [Table(f"Verdicts for {arm}, at the final token.", head, rows, text_columns=4, view={"arm": arm})]
        if rows
        else []
    )


def _layers(mark: str, found: list[str], asked: dict[str, Any]) -> str:
    if not found:
        return MISSING
    return f"{mark} " + ("all" if len(found) == len(asked) > 1 else ", ".join(found))


def readings_table(arm: str, cells_by_layer: dict[str, Any], layers: list[str]) -> list[Table]:
    readings = (
        ("Raw, harmful", "raw", "harmful", 1),
        ("Raw, benign", "raw", "benign", 1),
        ("Gap", "contrast", "gap", 1),
        ("Gap lost", "contrast", "gap_shrink", 2),
        ("Lost gap restored", "contrast", "gap_restored", 2),
        ("AUROC", "contrast", "auroc", 2),
        ("Shift, harmful", "shift", "harmful", 1),
        ("Placed probe AUROC", "placed", "auroc", 2),
        ("Transfer AUROC", "placed", "transfer_auroc", 2),
        ("Realigned gap", "realigned", "gap", 1),
    )
    rows = []
    for name, reading, leaf, digits in readings:
        cells = [(((cells_by_layer.get(l) or {}).get(reading) or {}).get("final") or {}).get(leaf) for l in layers]
        if all(math.isnan(number(cell)) for cell in cells):
            continue
        rows.append([name, *[plain(cell, digits) for cell in cells]])
        floors = [
            (((((cells_by_layer.get(l) or {}).get("floor") or {}).get(reading) or {}).get("final") or {}).get(leaf))
            for l in layers
        ]
        if any(isinstance(f, dict) for f in floors):
            rows.append(["  floor", *[_range(f, digits) for f in floors]])
    for name, control in (("Random weights", "random_weights"), ("Shuffled labels", "shuffled_labels")):
        cells = [
            (((cells_by_layer.get(l) or {}).get("controls") or {}).get(control) or {}).get("auroc") for l in layers
        ]
        if not all(math.isnan(number(cell)) for cell in cells):
            rows.append([f"{name}, AUROC", *[plain(cell) for cell in cells]])
    if not rows:
        return []
    head = ["Reading", *[f"Layer {layer}" for layer in layers]]
    caption = (
        f"Every reading at the final token, {arm}, with 95% intervals; floor: range without a change of behaviour."
    )
    return [Table(caption, head, rows, folded=True, view={"arm": arm})]


def _range(floor: Any, digits: int) -> str:
    if not isinstance(floor, dict) or floor.get("low") is None or floor.get("high") is None:
        return MISSING
    return f"[{floor['low']:.{digits}f}, {floor['high']:.{digits}f}]".replace("-", "\u2212")


def floor_note(floor: dict[str, Any]) -> str:
    if not floor.get("n"):
        return ""
    kinds: dict[str, int] = {}
    for update in floor.get("updates") or []:
        kinds[str(update.get("kind"))] = kinds.get(str(update.get("kind")), 0) + 1
    mix = ", ".join(f"{many} × {kind}" for kind, many in kinds.items())
    spurned = f"; {floor['rejected']} more changed behaviour and were left out" if floor.get("rejected") else ""
    return (
        f"Noise floor from {floor['n']} updates that change no behaviour" + (f" ({mix})" if mix else "") + spurned + "."
    )
