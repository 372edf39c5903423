"""Speed and memory against peers, side by side in one run. Every file is a command: ``python -m benchmarks.search``."""

import os

from pingscope.experiments.run.waiting import wait_shortly

wait_shortly(os.environ)  # as the command line does, before torch is imported
