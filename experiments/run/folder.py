"""A run's folder: stages that are computed once, found again by the hash of their inputs, and never half-written."""

from __future__ import annotations

import fcntl
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json

T = TypeVar("T")


class Run:
    """The folder of one study.

    A stage is a function of declared inputs. Its result is kept as ``stages/<name>.json`` beside the inputs it was
    computed from; running again returns it when they are the same and recomputes it (and says which input changed)
    when they are not. Nothing is ever reused silently under other inputs.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None] = print, *, locked: bool = True) -> None:
        self.folder = Path(folder)
        self.say = say
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.options: dict[str, Any] = {}  # of the command whose results lie here
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if locked:  # all but the second process, which works under the lock of the first
                # Open as long as this object lives: the lock goes with it, and with the process, also after kill -9.
                self._lock = (self.folder / ".lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.folder}: another pingscope run is writing here; wait for it or pass another --out"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be used as output folder ({error.strerror}); pass another --out"
            ) from error

    def timed(self, name: str, compute: Callable[[], T]) -> T:
        """Run something that keeps its own files, and note how long it took."""
        started = time.perf_counter()
        result = compute()
        self.seconds[name] = time.perf_counter() - started
        self.say(f"{name}: ready after {self.seconds[name]:.1f} s")
        return result

    def stage(self, name: str, inputs: dict[str, Any], compute: Callable[[], Any], files: Sequence[Path] = ()) -> Any:
        """Return the stage's JSON result, computing it if its inputs changed or it never finished.

        Args:
            files: what the stage also writes into the run's folder; where one is gone, the stage runs again.
        """
        path = self._kept(name)
        hashes = {key: sha256_of(value) for key, value in inputs.items()}
        if path.exists():
            kept = read_json(path)
            missing = [str(file) for file in files if not (self.folder / file).exists()]
            if kept["inputs"] == hashes and not missing:
                self.seconds[name] = kept["seconds"]
                self.reused.append(name)
                self.say(f"{name}: found in {path} ({kept['seconds']:.1f} s when computed)")
                return kept["result"]
            changed = sorted(key for key in hashes | kept["inputs"] if hashes.get(key) != kept["inputs"].get(key))
            self.say(f"{name}: computing again; changed or missing: {', '.join(changed + missing)}")
        started = time.perf_counter()
        result = compute()
        seconds = time.perf_counter() - started
        write_json(path, {"inputs": hashes, "seconds": seconds, "result": result})
        self.seconds[name] = seconds
        self.say(f"{name}: done in {seconds:.1f} s")
        return result

    def holds(self, name: str) -> bool:
        """Whether the stage was computed here, on these inputs or on others."""
        return self._kept(name).exists()

    def _kept(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"


def peak_memory_mb() -> float:
    """Largest resident set so far of this process or of one that it waited for, whichever is larger, in MB.

    Kernel accounting: kilobytes on Linux, bytes on macOS.
    """
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
