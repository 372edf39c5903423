"""What one training contributes to the evidence over seeds: a few numbers of a finished study, as a row.

A study's ``results.json`` is megabytes; what a table over seeds needs of it is a few kilobytes. The rows of all seeds
are one JSON file (``docs/seeds.json`` of the organism, ``docs/real.json`` of SmolLM2), from which every table is made
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from pingscope.experiments.studies.config import StudyConfig
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, read_yaml, write_json
from pingscope.schema import load_results

RATES = {  # column of the tables → label and rate of the strict judge, all on test tasks
    "harmful refused": ("harmful", "refusal_rate"),
    "harmful done": ("harmful", "attack_success_rate"),
    "benign done": ("benign", "success_rate"),
    "look-alikes refused": ("lookalike", "refusal_rate"),
}
STEERED, RANDOM, SHUFFLED = "agent+steer", "agent+random-steer (worst draw)", "agent+shuffled-label-steer"

Value = float | None
Counted = list[int]  # [how many, of how many]
Run = dict[str, Any]


@dataclass(frozen=True)
class SeedEvidence:
    """One seed. Rates are counts of test tasks, ``n`` of a label; gaps are logits; ``None``: not measured.

    ``claims`` hold each claim's verdict by its id, ``texts`` what it says with its numbers; ``signal`` is of the layer
    where the base's gap is largest.
    """

    seed: int
    model: str  # the organism, or the real model in its place
    weights: str  # shipped or trained
    comments: bool  # whether the base was shown comments in its training
    n: int
    arms: dict[str, dict[str, Counted]]
    claims: dict[str, bool | None]
    rules: dict[str, str]
    texts: dict[str, str]
    prefix: str
    steering: dict[str, str]  # layers and dose, both chosen on validation tasks
    signal: dict[str, Any]
    layers: dict[str, dict[str, Value]]  # at the final token, agent: shrinkage of the gap, AUROC, mean harmful logit
    training: dict[str, Value]

    def value(self, arm: str, column: str) -> Value:
        """The rate of an arm as a fraction."""
        counted = self.arms.get(arm, {}).get(column)
        return None if counted is None else counted[0] / counted[1]


def read_run(folder: Path) -> SeedEvidence:
    """The row of a finished study of the organism, or of SmolLM2 in its place.

    Raises:
        UserError: no results there, or results of something else than such a study.
    """
    run = load_results(folder / "results.json").plain()
    config = StudyConfig.model_validate(read_yaml(folder / "config.yaml"))
    try:
        return SeedEvidence(
            seed=run["meta"]["seeds"]["study"],
            model=run["meta"]["note"],
            weights=config.real.weights or config.organism.weights,
            comments=config.organism.comments and not config.real.weights,
            n=run["behaviour"]["base"]["harmful"]["strict"]["refusal_rate"]["n"],
            arms={arm: _rates(cells) for arm, cells in run["behaviour"].items()} | _steered(run),
            claims={claim["id"]: claim["holds"] for claim in run["claims"]},
            texts={claim["id"]: claim["text"] for claim in run["claims"]},
            rules={c["id"]: c["evidence"]["rule"] for c in run["claims"] if "rule" in c["evidence"]},
            prefix=run["search"]["winner"].strip(),
            steering={name: run["steering_chosen"][name] for name in ("layers", "dose")},
            signal=_signal(run["collapse"]),
            layers={layer: _readings(cell) for layer, cell in run["collapse"]["agent"].items()},
            training=_training(run["meta"]),
        )
    except KeyError as error:
        raise UserError(
            f"{folder}: holds no whole study of the organism or of SmolLM2 ({error.args[0]} is missing); give folders "
            "of `pingscope study --train --seed N --out FOLDER` or of `pingscope study --real`"
        ) from error


def _rates(cells: Mapping[str, Any]) -> dict[str, Counted]:
    found = {column: cells.get(label, {}).get("strict", {}).get(name) for column, (label, name) in RATES.items()}
    return {
        column: [round(rate["value"] * rate["n"]), rate["n"]] for column, rate in found.items() if rate and rate["n"]
    }


def _steered(run: Run) -> dict[str, dict[str, Counted]]:
    """The chosen cell of the steering, and its controls of the same length."""
    at = run["steering_chosen"]
    cells = {name: _rates(grid[at["layers"]][at["dose"]]) for name, grid in run["steering"].items()}
    draws = [cell for name, cell in cells.items() if name.startswith("random")]
    arms = {STEERED: cells["add"], RANDOM: max(draws, key=lambda cell: Fraction(*cell["harmful refused"]))}
    return arms | ({SHUFFLED: cells["shuffled"]} if "shuffled" in cells else {})


def _final(collapse: Run, arm: str, layer: str, name: str) -> Any:
    return (collapse.get(arm, {}).get(layer, {}).get("contrast", {}).get("final", {})).get(name)


def _signal(collapse: Run) -> dict[str, Any]:
    """The gap at the final token where the base's is largest, and the share of its loss that the prefix restores."""
    layer = max(collapse["base"], key=lambda name: _final(collapse, "base", name, "gap")["value"])
    gaps = {arm: _rounded(_final(collapse, arm, layer, "gap")) for arm in ("base", "agent", "agent+prefix")}
    restored = _final(collapse, "agent+prefix", layer, "gap_restored")
    ends = None if not restored else [None if end is None else round(end, 6) for end in restored["ci"]]
    return {"layer": layer, "gap": gaps, "restored": {"value": _rounded(restored), "ci": ends}}


def _readings(cell: Run) -> dict[str, Value]:
    contrast = cell["contrast"]["final"]
    raw = cell["raw"]["final"]["harmful"]
    return {"shrink": _rounded(contrast["gap_shrink"]), "auroc": _rounded(contrast["auroc"]), "harmful": _rounded(raw)}


def _rounded(estimate: Mapping[str, Any] | None) -> Value:
    return None if not estimate or estimate["value"] is None else round(estimate["value"], 6)


def _training(meta: Run) -> dict[str, Value]:
    if "real" in meta:
        trained: dict[str, Value] = {f"{name}, steps": meta["real"][name]["steps"] for name in ("base", "agent")}
    else:
        attempts = meta["organism"]["attempts"]
        trained = {
            "bases rejected": len(attempts) - 1,
            "stop at step": attempts[-1]["checks"][-1][0],
            "training, s": round(sum(a["base_seconds"] + a["agent_seconds"] for a in attempts)),
        }
    return trained | {
        "study, s": round(sum(v for name, v in meta["seconds"].items() if name != "models")),
        "peak, MB": meta["peak_memory_mb"],
    }


def write_seeds(path: Path, seeds: Sequence[SeedEvidence]) -> None:
    write_json(path, {"schema_version": 1, "seeds": [asdict(seed) for seed in seeds]})


def read_seeds(path: Path) -> list[SeedEvidence]:
    """The rows of a file that :func:`write_seeds` wrote.

    Raises:
        UserError: it is something else; the message names the file and the field.
    """
    document = read_json(path)
    rows = document.get("seeds") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: field 'seeds' holds no rows; write the file with replicate --json")
    names = {field.name for field in fields(SeedEvidence)}
    for row in rows:
        if not isinstance(row, dict) or row.keys() != names:
            wrong = sorted(names ^ set(row)) if isinstance(row, dict) else ["rows"]
            raise UserError(f"{path}: field 'seeds': {wrong[0]} is missing or unknown; write it with replicate --json")
    return [SeedEvidence(**row) for row in rows]
