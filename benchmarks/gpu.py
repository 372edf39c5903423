"""Everything that a GPU is to show, in one run of under six minutes, as one table for the docs.

    python -m benchmarks.gpu --docs docs/performance.md         on a GPU
    python -m benchmarks.gpu --device cpu --tiny                the same steps at toy sizes, in under a minute

In order: parity of every backend on the device, in both number formats; extraction at the shape of Llama 3.1 8B in
bfloat16 (random weights, made on the device) against the bare forward pass, and how much of the card's peak it reaches;
shared prefill against an expanded cache at the same shape; a whole study as a command of its own. A step that fails
is reported as failed, and the next one runs.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import extraction, search
from benchmarks.subject import lengths, natural_prompts, random_model, spelled
from benchmarks.timing import Ratio, Table, circumstances, publish, ratio, single, turns
from pingscope.interp.backends import BACKENDS
from pingscope.interp.backends.parity import run_parity
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel

# Dense bfloat16 operations a second, from the makers' data sheets; the first name that the card's name contains counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}

STUDY_LIMIT = 200.0  # seconds


@dataclass(frozen=True)
class Sizes:
    """How much of each step."""

    parity_shape: str
    shape: str
    prompts: int
    rounds: int
    tasks: int
    candidates: int
    new_tokens: int
    study: dict[str, Any]  # a study's config


FULL = Sizes(
    parity_shape="smollm2-135m",
    shape="llama-3.1-8b",
    prompts=256,
    rounds=5,
    tasks=4,
    candidates=16,
    new_tokens=16,
    study={
        "tasks": {"n_validation": 16, "n_test": 24, "n_probe": 60},
        "search": {"k": 2, "M": 4, "T": 2},
        "steering": {"doses": [0.2], "random_draws": 1, "n_validation": 12, "n_curve": 12},
        "floor_updates": 4,
    },
)
TINY = Sizes(
    parity_shape="tiny",
    shape="tiny",
    prompts=6,
    rounds=2,
    tasks=2,
    candidates=3,
    new_tokens=4,
    study={
        "organism": {"weights": "tiny"},
        "tasks": {"n_validation": 4, "n_test": 4, "n_probe": 8},
        "search": {"k": 1, "M": 1, "T": 1},
        "steering": {"doses": [0.25], "random_draws": 1, "n_validation": 4, "n_curve": 4},
        "max_turns": 1,
        "max_new_tokens": 4,
        "floor_updates": 2,
    },
)


@dataclass(frozen=True)
class Found:
    """What a step adds to the table."""

    rows: list[Ratio]
    remark: str


def parity(sizes: Sizes, device: str) -> Found:
    """Worst error of every backend against plain runs, as a share of what its number format allows."""
    rows, cases = [], 0
    for dtype in ("float32", "bfloat16"):
        model = random_model(sizes.parity_shape, dtype, device)
        for backend in BACKENDS:
            checks = run_parity(load_model(model, backend=backend), reference=model, new_tokens=3)
            worst = max(checks, key=lambda check: check.error / (check.tolerance or 1e-9))
            share = worst.error / (worst.tolerance or 1e-9)
            rows.append(single(f"parity, {backend}, {dtype}: worst error / tolerance ({worst.name})", share, 1.0))
            cases += sum(check.cases for check in checks)
    return Found(rows, f"Parity: {cases} comparisons with unpadded plain runs, {sizes.parity_shape}.")


@torch.no_grad()
def reading(sizes: Sizes, model: HookedModel) -> Found:
    """Extraction of all layers against the bare forward pass, and the share of the card's peak."""
    rows = natural_prompts(model, sizes.prompts)
    contest = extraction.Contest(model, rows, peers=False)
    names = ("bare", "all layers", "store", "padded")
    seconds = turns([{name: contest.arms()[name] for name in names}] * sizes.rounds, model.device)
    flops = extraction.forward_flops(model, rows)
    measured = extraction.matmul_speed(model.device, torch.bfloat16, 8192 if model.device.type == "cuda" else 256)
    card = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    peak = next((value for name, value in PEAKS.items() if name in card), measured)
    used = [flops / took / peak for took in seconds["all layers"]]
    table = [
        ratio("bare forward / all layers in memory", seconds["bare"], seconds["all layers"], 0.9, False),
        ratio("bare forward / all layers to a store on disk", seconds["bare"], seconds["store"]),
        ratio("all layers / padded plain forward", seconds["all layers"], seconds["padded"]),
        ratio("MFU of extraction", used, [1.0] * len(used), 0.5, False),
        ratio("MFU of the bare forward", [flops / took / peak for took in seconds["bare"]], [1.0] * len(used)),
    ]
    took = sorted(seconds["all layers"])[len(used) // 2]
    source = "the data sheet" if peak != measured else "measured"
    remark = (
        f"Extraction: {spelled(model)}; {lengths(rows)}; {sum(map(len, rows)) / took:.0f} tokens/s, "
        f"{flops / took / 1e12:.3g} TFLOP/s, of a peak of {peak / 1e12:.3g} ({source}); "
        f"a large matrix product reaches {measured / 1e12:.3g}."
    )
    return Found(table, remark)


def prefixes(sizes: Sizes, model: HookedModel) -> Found:
    """Shared prefill against plain generation and an expanded cache."""
    found = search.measure(model, sizes.tasks, sizes.candidates, sizes.new_tokens, sizes.rounds)
    what = f"{sizes.tasks} tasks x {sizes.candidates} prefixes x {sizes.new_tokens} new tokens"
    return Found(list(found.rows), " ".join([f"Search: {what}.", *found.remarks]))


def study(sizes: Sizes, device: str, command: str) -> Found:
    """Seconds of a whole study in a process of its own: ``command``, or the organism's with small sizes.

    Raises:
        RuntimeError: it ended with another code than 0.
        subprocess.TimeoutExpired: the organism's took longer than :data:`STUDY_LIMIT`; a command given may.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "study.yaml"
        config.write_text(yaml.safe_dump(sizes.study | {"models": {"device": device}}))
        own = [sys.executable, "-m", "pingscope.experiments.cli.main", "study"]
        words = shlex.split(command) or [*own, "--config", str(config), "--out", str(Path(folder) / "run")]
        started = time.perf_counter()
        ended = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=None if command else STUDY_LIMIT
        )
        took = time.perf_counter() - started
    if ended.returncode:
        raise RuntimeError(f"the study ended with code {ended.returncode}: {' '.join(ended.stderr.split())[-300:]}")
    what = command or "pingscope study, the organism with small sizes"
    return Found([single("a whole study, seconds", took)], f"Study: {what}.")


def attempt(name: str, step: Callable[[], Found]) -> Found:
    """What a step found, or a remark that it failed; its memory is given back either way."""
    started = time.perf_counter()
    try:
        found = step()
    except Exception as error:  # noqa: BLE001 - one step that cannot run must not cost what the others find
        why = " ".join(str(error).split())[:300]
        found = Found([], f"**{name} failed**: {type(error).__name__}: {why}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def measure(sizes: Sizes, device: str, command: str = "") -> Table:
    """All steps in their order."""
    started = time.perf_counter()

    @cache
    def model() -> HookedModel:  # made by the first step that wants it
        return random_model(sizes.shape, "bfloat16", device)

    found = [
        attempt("parity", lambda: parity(sizes, device)),
        attempt("extraction", lambda: reading(sizes, model())),
        attempt("search", lambda: prefixes(sizes, model())),
        attempt("study", lambda: study(sizes, device, command)),
    ]
    took = time.perf_counter() - started
    caption = f"{circumstances(torch.device(device))}; {sizes.rounds} rounds; {took:.0f} s in all."
    return Table(caption, [row for one in found for row in one.rows], [one.remark for one in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that every step runs")
    parser.add_argument("--study", default="", metavar="COMMAND", help="default: the organism with small sizes")
    parser.add_argument("--docs", type=Path, default=None, help="Markdown file whose marked part is replaced")
    given = parser.parse_args()
    table = measure(TINY if given.tiny else FULL, given.device, given.study)
    publish(table, "benchmarks.gpu", given.docs)
    if any("failed**" in remark for remark in table.remarks):
        sys.exit(1)


if __name__ == "__main__":
    main()
