"""What is refused before a model is loaded: outputs over inputs, splits that overlap, labels that are missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pingscope.experiments.cli.parameters import Options, flag_name
from pingscope.experiments.tasks.presets import deduplicate
from pingscope.experiments.tasks.records import Record
from pingscope.interp.errors import UserError


def safe_out(options: Options) -> None:
    """``--out`` must not be an input, nor a folder that holds a model or store that is one."""
    out = getattr(options, "out", None)
    if out is None:
        return
    target = Path(out).resolve()
    for name in type(options).model_fields:
        if name == "out":
            continue
        for path in _paths(getattr(options, name)):
            if path == target:
                raise UserError(f"--out {out}: is also the input of {flag_name(type(options), name)}; give another one")
            if path.is_dir() and target in path.parents:
                raise UserError(f"--out {out}: holds the input of {flag_name(type(options), name)}; give another one")


def _paths(value: Any) -> Iterable[Path]:
    """Existing files and folders that an option's value names, a preset's or a generator's (KIND:PATH) included."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str | Path):
            for text in {str(one), str(one).partition(":")[2]} - {""}:
                try:
                    path = Path(text)
                    if path.exists():
                        yield path.resolve()
                except (OSError, ValueError):  # a text too long or odd for a path is none
                    continue


def disjoint(splits: Mapping[str, tuple[str, Sequence[Record]]]) -> None:
    """Task sets by option must share no instruction (up to case, space and punctuation)."""
    named = [(option, spec, records) for option, (spec, records) in splits.items() if spec]
    for i, (option, spec, records) in enumerate(named):
        for other, other_spec, others in named[:i]:
            unique = deduplicate(records)
            shared = len(unique) - len(deduplicate(records, others))
            if shared:
                raise UserError(
                    f"{option} {spec}: {shared} of {len(unique)} tasks are also in {other} {other_spec}; "
                    "give tasks that do not overlap"
                )


def needs_labels(
    option: str, spec: str, records: Sequence[Record], labels: Iterable[str] = ("harmful", "benign")
) -> None:
    """Every label must be there: a comparison without its other side is none."""
    have = {record.label for record in records}
    if missing := [label for label in labels if label not in have]:
        raise UserError(f"{option} {spec}: holds no {missing[0]} task; add some (both labels are compared)")


def enough_benign(option: str, spec: str, records: Sequence[Record], choosing: Sequence[bool], fpr: float) -> None:
    """A false-positive rate needs enough benign tasks to be told from zero, among those that set the threshold.

    Args:
        choosing: for every task whether it chooses the gate, and so sets no threshold.
    """
    held = [record for record, flag in zip(records, choosing, strict=True) if not flag and record.label != "harmful"]
    needed = math.ceil(1 / fpr - 1 - 1e-9)
    if len(held) < needed:
        raise UserError(
            f"{option} {spec}: {len(held)} benign tasks set the threshold (the other half chooses the gate) and cannot "
            f"state --fpr {fpr:g}; give at least {2 * needed + 2} benign ones in all or a larger --fpr"
        )
