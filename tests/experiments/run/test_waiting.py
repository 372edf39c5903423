"""Threads of OpenMP spin shortly, where the command line starts them and the user has not decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pingscope.experiments.run.waiting import DECIDED_BY, SPINS, wait_shortly


@pytest.mark.parametrize("name", DECIDED_BY)
def test_what_the_user_set_stays(name):
    environment = {name: "7"}
    wait_shortly(environment)
    assert environment == {name: "7"}


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP")
def test_the_library_reads_it_when_the_command_line_loads_torch():
    script = (
        "import sys; sys.argv = ['pingscope', '--version']\n"
        "from pingscope.experiments.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import torch; torch.ones(9).sum()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in DECIDED_BY}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in ended.stderr
