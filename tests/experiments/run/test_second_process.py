"""Stages in a second process: same results, errors that arrive, and nothing that outlives the first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pingscope.experiments.run.folder import Run
from pingscope.experiments.run.second_process import second_process
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.studies.materials import Bench, open_bench
from pingscope.interp.errors import UserError

pytestmark = pytest.mark.slow

CONFIG = StudyConfig.model_validate(
    {"organism": {"weights": "tiny"}, "tasks": {"n_validation": 4, "n_test": 4, "n_probe": 8}}
)


def pid(bench: Bench, name: str) -> int:
    return bench.run.stage(name, {"test": len(bench.test)}, os.getpid)


def fails(bench: Bench) -> None:
    raise UserError("field 'x': wrong; mend it")


def dies(bench: Bench, home: int) -> str:
    if os.getpid() != home:
        os.kill(os.getpid(), signal.SIGKILL)
    return "computed at home"


def sleeps(bench: Bench, told: Path) -> None:
    told.write_text(str(os.getpid()))
    time.sleep(600)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def bench(tmp_path, said) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield open_bench(CONFIG, Run(tmp_path / "run", said.append))
    assert torch.get_num_threads() == 2  # given back
    torch.set_num_threads(threads)


def test_a_stage_runs_elsewhere_and_is_found_here(bench, said):
    with second_process(bench, ["elsewhere"]) as submit:
        elsewhere = submit("elsewhere", pid, "elsewhere")
        assert pid(bench, "here") == os.getpid()
        there = elsewhere()
    assert there != os.getpid()
    assert "elsewhere" in bench.run.seconds and [line.split(":")[0] for line in said] == ["here", "elsewhere"]
    with second_process(bench, ["elsewhere"]) as submit:
        assert submit("elsewhere", pid, "elsewhere")() == there  # from the folder, and no process is started for it
    assert said[-1].startswith("elsewhere: found in")


def test_errors_arrive_and_a_killed_process_is_no_error(bench, said):
    with second_process(bench, ["fails", "dies"]) as submit:
        failed = submit("fails", fails)
        died = submit("dies", dies, os.getpid())
        with pytest.raises(UserError, match="field 'x'"):
            failed()
        assert died() == "computed at home" and "computing it here" in said[-1]


def test_nothing_outlives_the_block(bench, tmp_path):
    told = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt), second_process(bench, ["sleeps"]) as submit:
        submit("sleeps", sleeps, told)
        while not told.exists() or not told.read_text():
            time.sleep(0.05)
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_one_thread_to_begin_with_means_one_process(bench):
    torch.set_num_threads(1)
    with second_process(bench, ["here"]) as submit:
        assert submit("here", pid, "here")() == os.getpid()
    torch.set_num_threads(2)
