"""What another busy process costs, by how OpenMP's threads wait for each other.

    python -m benchmarks.neighbour [--model FOLDER] [--rounds 5]

One process for each way of waiting, each with all threads of the machine: the library's own (long spinning), none
(``OMP_WAIT_POLICY=PASSIVE``), and the short spin that the command line sets. They take turns, alone and beside a
process that does nothing but count, which is stopped in between.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.subject import natural_prompts, subject_of, subject_options
from benchmarks.timing import Ratio, Table, Work, circumstances, publish, ratio, single, turns
from pingscope.experiments.run.waiting import DECIDED_BY, SPINS
from pingscope.interp.generate.generation import generate
from pingscope.interp.model.hooked import HookedModel

LONG, NEVER, SHORT = "long spin (OpenMP's own)", "no spin (PASSIVE)", "short spin (the command line's)"
WAYS = {
    LONG: {},
    NEVER: {"OMP_WAIT_POLICY": "PASSIVE"},
    SHORT: {"GOMP_SPINCOUNT": f"{SPINS}"},
}
WORKS = ("reading", "decoding")
BAR = 3.0  # beside one busy process on two cores twice as long is fair


def work_of(model: HookedModel, prompts: int, new_tokens: int) -> dict[str, Work]:
    """What is timed: residuals of a few prompts, and decoding for the same."""
    rows = natural_prompts(model, prompts)
    short = [type(row)(row.id, row.label, row.ids[:8], row.roles[:8]) for row in rows]
    return {
        "reading": lambda: model.residuals(rows, "all"),
        "decoding": lambda: generate(model, short, max_new_tokens=new_tokens),
    }


def serve(given: argparse.Namespace) -> None:
    """In a process of its own: do a work whenever a line names it, and say so when it is done."""
    works = work_of(subject_of(given).load(), given.prompts, given.new_tokens)
    for work in works.values():
        work()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        works[line.strip()]()
        print("done", flush=True)


@contextmanager
def worker(way: str, arguments: list[str]) -> Iterator[Callable[[str], None]]:
    """A process that waits in one of :data:`WAYS`; what is yielded lets it do a work and returns when it is done."""
    environment = {name: value for name, value in os.environ.items() if name not in (*DECIDED_BY, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.neighbour", "--serve", *arguments]
    with subprocess.Popen(
        command, env=environment | WAYS[way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        sent, said = process.stdin, process.stdout

        def ask(work: str) -> None:
            sent.write(work + "\n")
            if said.readline().strip() != "done":
                raise RuntimeError(f"the process with {way} ended with code {process.wait()}")

        try:
            if not said.readline():
                raise RuntimeError(f"the process with {way} did not start: code {process.wait()}")
            yield ask
        finally:
            process.kill()


@contextmanager
def stopped_neighbour() -> Iterator[Callable[[Work], None]]:
    """A process that only counts; what is yielded lets it run for the length of a work."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        process.send_signal(signal.SIGSTOP)

        def beside(work: Work) -> None:
            process.send_signal(signal.SIGCONT)
            try:
                work()
            finally:
                process.send_signal(signal.SIGSTOP)

        try:
            yield beside
        finally:
            process.kill()


def measure(given: argparse.Namespace, arguments: list[str]) -> Table:
    """Every way of waiting, alone and beside the neighbour, reading and decoding."""
    rows: list[Ratio] = []
    with ExitStack() as stack:
        beside = stack.enter_context(stopped_neighbour())
        asks = {way: stack.enter_context(worker(way, arguments)) for way in WAYS}
        for work in WORKS:
            alone: dict[str, Work] = {f"{way}, alone": lambda ask=ask, w=work: ask(w) for way, ask in asks.items()}  # type: ignore[misc]
            busy: dict[str, Work] = {
                f"{way}, busy": lambda run=alone[f"{way}, alone"]: beside(run)  # type: ignore[misc]
                for way in asks
            }
            seconds = turns([alone | busy] * given.rounds, torch.device("cpu"), warm=False)
            rows += [
                ratio(
                    f"{work}, {way}: with a busy neighbour / alone",
                    seconds[f"{way}, busy"],
                    seconds[f"{way}, alone"],
                    BAR if way == SHORT else None,
                )
                for way in WAYS
            ]
            for state in ("alone", "busy"):
                mine = seconds[f"{SHORT}, {state}"]
                rows += [
                    ratio(f"{work}, {state}: {way} / {SHORT}", seconds[f"{way}, {state}"], mine)
                    for way in (LONG, NEVER)
                ]
            worst = max(seconds[f"{LONG}, busy"]) / max(seconds[f"{SHORT}, busy"])
            rows.append(single(f"{work}, busy: slowest run, {LONG} / {SHORT}", worst))
    caption = (
        f"{given.shape if not given.model else 'the given model'}, {given.dtype}: reading {given.prompts} natural "
        f"prompts, decoding {given.new_tokens} tokens after the first 8 of each; {given.rounds} rounds; "
        f"{circumstances(torch.device('cpu'))}."
    )
    return Table(caption, rows)


def main() -> None:
    parser = subject_options(__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given)
    own = [f"--{name}={getattr(given, name)}" for name in ("model", "shape", "dtype", "device", "prompts")]
    publish(measure(given, [*own, f"--new-tokens={given.new_tokens}"]), "benchmarks.neighbour", given.docs)


if __name__ == "__main__":
    main()
