"""Whether weights fit into memory, asked before they are read: the kernel ends a process that is too large unasked."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pingscope.interp.errors import UserError
from pingscope.interp.gguf import read_header

GIGABYTE = 1e9
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "fast": 6}  # fast: both while they are compared
_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}  # safetensors' names; all others: one byte
_FLOATS = ("F64", "F32", "F16", "BF16")
# The model while it loads, over its weights. A folder's are mapped from their file; a GGUF's are undone beside the
# model (measured at 135M parameters, the mapped file left out: 1.6 in float32, 2.25 in bfloat16).
FOLDER, GGUF = 1.0, 2.0


def weight_bytes(place: Path, gguf: str, dtype: str) -> int:
    """Bytes that loading takes, from the files' headers; 0 where they do not say (a hub id).

    Args:
        place: a folder; gguf: the file in it, where the weights are one.
        dtype: as :func:`pingscope.interp.loading.load_model` takes it; what is not stored as floats stays as it is.
    """
    if gguf:
        return int(read_header(place / gguf).parameters * WIDTHS.get(dtype, 4) * GGUF)
    total = 0
    for shard in place.glob("model*.safetensors"):
        try:
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                    one = tensors.get_slice(name)
                    stored = one.get_dtype()
                    width = WIDTHS.get(dtype) if stored in _FLOATS else None
                    total += prod(one.get_shape()) * (width or _STORED.get(stored, 1))
        except (SafetensorError, OSError):
            return 0  # refused by name where files are checked
    return int(total * FOLDER)


def check_fits(name: str, needed: int) -> None:
    """Refuse what is larger than the memory that is free.

    Raises:
        UserError: names the model and both sizes.
    """
    free = available()
    if free and needed > free:
        raise UserError(
            f"{name}: loading takes about {needed / GIGABYTE:.1f} GB, and {free / GIGABYTE:.1f} GB of memory are free; "
            "pass --dtype bfloat16 or --device sharded, free some, or take a smaller model"
        )


def available(root: Path = Path("/")) -> int:
    """Bytes that a process can still take: what the kernel says, within a container's limit; 0 if nothing is known."""
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]  # not Linux: all there is
    group = root / "sys/fs/cgroup"
    found += _limit(group, "memory.max", "memory.current")  # version 2, and under it version 1
    found += _limit(group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(found, default=0)


def _limit(group: Path, most: str, used: str) -> list[int]:
    """What a container's limit leaves; what it counts as used holds files that were read and can be let go."""
    try:
        limit, taken = int((group / most).read_text()), int((group / used).read_text())
        stat = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return []
    return [max(0, limit - max(0, taken - cached))]
