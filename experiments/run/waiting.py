"""How OpenMP's threads wait for each other while one of them is still at work."""

from __future__ import annotations

from collections.abc import MutableMapping

# Rounds of the wait loop, tens of microseconds: longer than the gap between two operations of a small model.
SPINS = 10_000
DECIDED_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_shortly(environment: MutableMapping[str, str]) -> None:
    """Let threads of GNU's OpenMP, which torch computes with on Linux, soon go to sleep; a user's own choice stays.

    By default they spin for milliseconds. Where another process is busy, the thread that spins keeps the core from
    the very one that it waits for. Not to spin at all (``OMP_WAIT_POLICY=PASSIVE``) slows the many small operations of
    decoding where the machine is idle: hence a short spin. ``python -m benchmarks.neighbour`` measures the three.

    The library reads this once, when it is loaded: call it before torch is imported.
    """
    if not any(name in environment for name in DECIDED_BY):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
