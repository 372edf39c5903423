"""The words of the report: claims, key numbers, method notes, limits, provenance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pingscope.figures import theme
from pingscope.figures.left_out import left_out
from pingscope.figures.numbers import interval, number, percent, plain, rate, sort_layers
from pingscope.schema import Estimate, Results

LEADS = ("base", "agent", "agent+prefix", "agent+steer", "agent+gated-prefix")  # at most three of them, in order
FOLDED = 6  # pieces of evidence that stand open under a claim
STATUS = {True: ("holds", "Holds"), False: ("absent", "Does not hold"), None: ("open", "Not measured")}


@dataclass(frozen=True)
class Claim:
    text: str
    status: str  # holds | absent | open
    word: str
    evidence: tuple[str, ...]

    @property
    def folded(self) -> bool:
        """Whether the evidence is too long to stand open: a sentence for every layer of a deep model."""
        return len(self.evidence) > FOLDED


@dataclass(frozen=True)
class Tile:
    """One key figure: a caption and up to three (arm, number, interval, palette name)."""

    caption: str
    parts: tuple[tuple[str, str, str, str], ...]


def claims(results: Results) -> list[Claim]:
    out = []
    for claim in results.claims:
        status, word = STATUS[claim.holds]
        out.append(Claim(claim.text, status, word, _evidence(claim.evidence)))
    return out


def _evidence(evidence: Any) -> tuple[str, ...]:
    if evidence is None:
        return ()
    if isinstance(evidence, dict):
        return tuple(f"{name.replace('_', ' ')} {_scalar(value)}" for name, value in evidence.items())
    if isinstance(evidence, list):
        return tuple(_scalar(item) for item in evidence)
    return (str(evidence),)


def _scalar(value: Any) -> str:
    if isinstance(value, Estimate):
        return plain(value)
    if isinstance(value, float):
        return plain(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return str(value)


def headline(results: Results) -> str:
    """How many of the claims hold, in one sentence; empty without claims."""
    verdicts = [claim.holds for claim in results.claims]
    if not verdicts:
        return ""
    held, failed = sum(v is True for v in verdicts), sum(v is False for v in verdicts)
    unknown = len(verdicts) - held - failed
    many = len(verdicts)
    said = f"{held} of {many} statements {'holds' if held == 1 else 'hold'} on these numbers"
    rest = []
    if failed:
        rest.append(f"{failed} {'does' if failed == 1 else 'do'} not")
    if unknown:
        rest.append(f"{unknown} could not be measured")
    return said + ("; " + ", ".join(rest) if rest else "") + "."


def tiles(results: Results) -> list[Tile]:
    behaviour = results.behaviour or {}
    leads = [arm for arm in LEADS if arm in behaviour][:3] or list(behaviour)[:3]
    rows = [
        _tile("Harmful tasks refused", {arm: rate(behaviour[arm], "harmful", "refusal_rate") for arm in leads}),
        _tile("Benign tasks done", {arm: rate(behaviour[arm], "benign", "success_rate") for arm in leads}),
    ]
    collapse = results.collapse or {}
    layers = sort_layers({layer for arm in collapse.values() for layer in arm})
    if layers:
        top = layers[-1]
        cells = {a: _final(collapse.get(a), top).get("gap") for a in LEADS[:3]}
        areas = {a: _final(collapse.get(a), top).get("auroc") for a in LEADS[:3]}
        rows.append(_tile(f"Gap at the final token, layer {top}, logits", cells, 1))
        rows.append(_tile(f"AUROC at the final token, layer {top}", areas, 2))
    return [tile for tile in rows if tile is not None]


def _final(arm: Any, layer: str) -> dict[str, Any]:
    return (((arm or {}).get(layer) or {}).get("contrast") or {}).get("final") or {}


def _tile(caption: str, cells: dict[str, Any], digits: int | None = None) -> Tile | None:
    parts = []
    for arm, cell in cells.items():
        value, (low, high) = number(cell), interval(cell)
        if math.isnan(value):
            continue
        if digits is None:
            text, ends = percent(cell, False), f"{100 * low:.0f} – {100 * high:.0f}"
        else:
            text, ends = plain(value, digits), f"{plain(low, digits)} – {plain(high, digits)}"
        parts.append((arm, text, "" if math.isnan(low) else ends, theme.arm_key(arm)))
    return Tile(caption, tuple(parts)) if parts else None


def methods(results: Results) -> list[str]:
    """What was done, for the parts that this run has."""
    notes = []
    if results.behaviour:
        notes.append(
            "Outcomes are read from the parsed action first: complied, refused, exited or invalid. An answer that the "
            "judge cannot read counts as missing, never as zero. Rates carry Wilson intervals, on test tasks only; "
            "every choice was made on validation tasks."
        )
    if results.probes or results.tracks:
        notes.append(
            "Probes are logistic regressions on standardised residuals at the output of each block, mapped back to raw "
            "space with their intercept. A safety logit is w·x + b; positive means harmful."
        )
    if results.curves or results.tracks:
        notes.append(
            "Positions are aligned by the role of a token, so that the header’s last token of every prompt is one "
            "place. Prompts without a token at a place are missing there, never counted as zero. Intervals "
            "over prompts are bootstrap percentiles."
        )
    if results.collapse:
        notes.append(
            "A single negative logit is no evidence of a lost signal, since markup tokens lie off the distribution a "
            "prompt-average probe was trained on. Hence the readings side by side, each beside its noise floor."
        )
    if results.steering:
        notes.append("Random directions have the same length as the probe’s, dose for dose.")
    if results.search:
        notes.append("The search scores the continuation only, never the injected prefix.")
    return notes + [str(line) for line in results.meta.methods]


def limits(results: Results) -> list[str]:
    notes = ["Intervals cover the sampling of prompts, not the training of another model with another seed."]
    if results.probes or results.tracks:
        notes.append("That a probe can read a signal does not show that the model uses it.")
    if results.search:
        notes.append(
            "The winner of a search is chosen by a score it was selected for; only held-out rates are evidence."
        )
    if aside := left_out(results):
        notes.append(aside)
    return notes + [str(line) for line in results.meta.limits]


def provenance(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (name, value): versions, models, seeds, time and memory, and whatever else the run noted."""
    meta = results.meta.model_dump(mode="json", exclude_unset=True)  # a run may note whatever it likes
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    models = meta.get("models") or {}
    rows = [(str(name), _flat(model)) for name, model in models.items()] if isinstance(models, dict) else []
    if meta.get("template_hash"):
        rows.append(("chat template", str(meta["template_hash"])))
    groups.append(("Models", rows))
    seeds = meta.get("seeds")
    rows = [(str(k), str(v)) for k, v in seeds.items()] if isinstance(seeds, dict) else []
    if not rows and seeds is not None:
        rows = [("seeds", _scalar(seeds))]
    groups.append(("Seeds", rows))
    versions = meta.get("versions") or {}
    groups.append(("Versions", [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []))
    seconds = meta.get("seconds") or {}
    rows = [(str(k), f"{number(v):.1f} s") for k, v in seconds.items()] if isinstance(seconds, dict) else []
    if rows:
        rows.append(
            (
                "stages together, some run side by side",
                f"{sum(v for v in map(number, seconds.values()) if v == v):.1f} s",
            )
        )
    if meta.get("peak_memory_mb") is not None:
        rows.append(("peak memory of one process", f"{number(meta['peak_memory_mb']):.0f} MB"))
    groups.append(("Time and memory", rows))
    groups.append(("Training of the model organism", _organism(meta.get("organism"))))
    groups.append(("Training of the adapters", _adapters(meta.get("real"))))
    shown = {
        "title",
        "organism",
        "real",
        "note",
        "models",
        "template_hash",
        "seeds",
        "versions",
        "seconds",
        "peak_memory_mb",
        "limits",
        "methods",
    }
    groups.append(("Also noted", [(str(k).replace("_", " "), _flat(v)) for k, v in meta.items() if k not in shown]))
    return [(name, rows) for name, rows in groups if rows]


def _organism(log: Any) -> list[tuple[str, str]]:
    """The last attempt's log in a few lines; losses and every check stay in ``results.json``."""
    attempts = log.get("attempts") if isinstance(log, dict) else None
    if not attempts:
        return []
    last = attempts[-1]
    rows = [("seed", str(log.get("seed"))), ("bases rejected before", str(len(attempts) - 1))]
    rows += [(f"{name} trained in", f"{number(last.get(f'{name}_seconds')):.0f} s") for name in ("base", "agent")]
    if last.get("checks"):
        step, refused, done = last["checks"][-1]
        rows.append((f"stopped after step {step}", f"{refused:.0%} refused, {number(done):.0%} done, training tasks"))
    return rows


def _adapters(log: Any) -> list[tuple[str, str]]:
    """The two trainings of the real model in a line each; every logged loss stays in ``results.json``."""
    rows = []
    for name in ("base", "agent"):
        one = log.get(name) if isinstance(log, dict) else None
        if one:
            config, losses = one["config"], one["loss"]
            what = f"{one['steps']} steps, {one['examples']} examples, LoRA of rank {config['lora_rank']}, "
            what += f"learning rate {config['learning_rate']:g}, batch {config['batch_size']}"
            rows.append((name, what + (f", loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else "")))
    return rows


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" if k not in ("id", "fingerprint") else _flat(v) for k, v in value.items())
    return _scalar(value)
