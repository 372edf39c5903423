"""A second process for the stages of a narrow model: its operations are too small for two threads, not for two cores.

Stages that do not wait for each other run side by side. The second process works in the same folder and hands back
each stage's result; what it computed lies in ``stages/`` as ever, so no number depends on where it was computed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits

from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.progress import bar, console
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.studies.materials import Bench, open_bench
from pingscope.interp.model.hooked import HookedModel

NARROW = 256  # d_model: up to here several threads mostly wait for each other

Later = Callable[[], Any]


class Submit(Protocol):
    """Start ``stage(bench, *more)``, known in the folder as ``name``; what comes back is called for its result."""

    def __call__(self, name: str, stage: Callable[..., Any], /, *more: Any) -> Later: ...


def stage_threads(model: HookedModel) -> int:
    """Threads that a stage computes with: one for a narrow model on a CPU."""
    return 1 if model.device.type == "cpu" and model.d_model <= NARROW else torch.get_num_threads()


@contextmanager
def second_process(bench: Bench, names: Sequence[str]) -> Iterator[Submit]:
    """Lend a second process for the stages ``names``, and give both processes one thread each.

    It runs what is submitted in that order, and ends with the block, and with this process, however that ends. For a
    wide model, for a process of one thread, and where the folder holds all of ``names``, there is none: stages run
    here when their result is asked for.
    """
    model, threads = bench.agent, torch.get_num_threads()
    if model.device.type != "cpu" or model.d_model > NARROW:
        yield lambda _, stage, /, *more: partial(stage, bench, *more)
        return
    alone = threads == 1 or all(bench.run.holds(name) for name in names)
    spawn = get_context("spawn")
    reader, writer = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(1, spawn, initializer=_start, initargs=(bench.config, bench.run.folder, reader))

    def submit(name: str, stage: Callable[..., Any], /, *more: Any) -> Later:
        here = partial(stage, bench, *more)
        if alone:
            return here
        future = pool.submit(_run, stage, more)

        def result() -> Any:
            try:
                with bar(f"{name} (second process)", None):
                    found, seconds, lines = future.result()
            except BrokenProcessPool:
                bench.run.say(f"{name}: the second process was ended from outside (memory?); computing it here")
                return here()
            bench.run.seconds |= seconds
            for line in lines:
                bench.run.say(line)
            return found

        return result

    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield submit
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)
        reader.close()
        torch.set_num_threads(threads)


_settings: tuple[StudyConfig, Path]
_bench: Bench | None = None


def _start(config: StudyConfig, folder: Path, lifeline: Connection) -> None:
    global _settings
    _settings = config, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the first process decides
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")
    console.quiet = True  # one process draws bars and says what is done


def _end_with(lifeline: Connection) -> None:
    """The first process holds the other end: closed by it, or by the kernel after a kill, it ends this one."""
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)


def _run(stage: Callable[..., Any], more: tuple[Any, ...]) -> tuple[Any, dict[str, float], list[str]]:
    global _bench
    config, folder = _settings
    lines: list[str] = []
    if _bench is None:
        _bench = open_bench(config, Run(folder, locked=False))
    _bench.run.say, _bench.run.seconds = lines.append, {}
    return stage(_bench, *more), _bench.run.seconds, lines
