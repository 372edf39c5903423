"""Files that come with the project: what was packed is what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError
from pingscope.interp.files import sha256_of


def check_files(folder: Path, manifest: dict[str, Any], train: str) -> None:
    """Every shipped file has the bytes that were packed.

    Args:
        train: the command that makes such weights anew.

    Raises:
        UserError: names the file that is gone or damaged.
    """
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path.read_bytes()) != wanted:
            raise UserError(f"{path}: is missing or not as it was shipped; install pingscope again, or train: {train}")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, for a manifest."""
    return {path.name: sha256_of(path.read_bytes()) for path in sorted(folder.iterdir())}
