"""Where a command writes: never over what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pingscope.interp.errors import UserError


def check_output(out: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse an output that is an input, or lies in one, or holds one that it would replace.

    Args:
        inputs: option → path, hub id or preset; what is no path here is passed over.

    Raises:
        UserError: names the option.
    """
    target = Path(out).expanduser().resolve()
    for option, given in inputs.items():
        if not given:
            continue
        name = str(given)
        path = Path(name).expanduser()
        if not path.exists() and ":" in name:
            path = Path(name.partition(":")[2]).expanduser()
        if not path.exists() or not path.name:
            continue
        source = path.resolve()
        inside = source.is_dir() and target.is_relative_to(source)
        if target == source or inside:
            what = "is" if target == source else "lies within"
            raise UserError(f"--out {out}: {what} {option} {given}, which would be overwritten; pass another --out")
