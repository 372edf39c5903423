"""What the benchmarks have in common is exact; each of them runs and compares what is the same work."""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import extraction, probes, search, steering, timing
from benchmarks.subject import natural_prompts, random_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return random_model("tiny", "float32", "cpu")


@pytest.mark.parametrize("n", range(1, 12))
def test_an_interval_is_the_narrowest_that_holds_the_median_often_enough(n):
    """Every draw of n values is below or above the true median: count over all 2^n of these patterns."""

    def coverage(skip: int) -> float:
        held = (skip < sum(below) < n - skip for below in product((0, 1), repeat=n))
        return sum(held) / 2**n

    low, high = timing.interval([float(i) for i in range(n)][::-1])
    skip = int(low)
    assert high == n - 1 - skip
    assert skip == 0 or coverage(skip) >= timing.COVERAGE
    assert skip + 1 > (n - 1) // 2 or coverage(skip + 1) < timing.COVERAGE


def test_arms_take_turns_and_ratios_stay_within_a_round(monkeypatch):
    ran: list[str] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    arms = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = timing.turns([arms] * 3, CPU)
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"
    assert seconds == {name: [1.0, 1.0, 1.0] for name in "abc"}
    drift = [1.0, 7.0, 50.0]  # of the machine, in both arms
    row = timing.ratio("x", [2 * one for one in drift], drift, bar=1.5)
    assert (row.value, row.low, row.high) == (2.0, 2.0, 2.0)
    assert row.verdict == "<= 1.5: MISSED"


def test_a_table_replaces_what_stood_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end -->\nbetween\n<!-- two -->\nkept\n<!-- end -->\n")
    table = timing.Table("What ran.", [timing.single("a / b", 0.5, 1.0)], ["A remark."])
    timing.publish(table, "one", page)
    text = page.read_text()
    assert "| a / b | 0.5 | <= 1: met |" in text and "old" not in text
    assert text.startswith("before\n<!-- one -->") and text.endswith("between\n<!-- two -->\nkept\n<!-- end -->\n")
    with pytest.raises(ValueError, match="three"):
        timing.publish(table, "three", page)


def test_operations_are_those_that_torch_counts(subject):
    row = natural_prompts(subject, 1)[0]
    given = subject.inputs(subject.batch([row]))
    subject.hf.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            subject.base(**given)
    finally:
        subject.hf.set_attn_implementation("sdpa")
    unseen = 2 * subject.n_layers * len(row) ** 2 * subject.d_model  # what eager attention computes and masks away
    assert extraction.forward_flops(subject, [row]) == counter.get_total_flops() - unseen


def test_every_contender_of_extraction_reads_the_same(subject):
    rows = natural_prompts(subject, 3)
    contest = extraction.Contest(subject, rows, peers=True)
    with torch.no_grad():
        ours, bridge, traced, hidden = (
            contest.ours(),
            contest.transformer_lens(),
            contest.nnsight(),
            contest.hidden_states(),
        )
    for layer, prompt in product(range(subject.n_layers), range(len(rows))):
        mine, n = ours[layer][prompt], len(rows[prompt])
        theirs = [bridge[f"blocks.{layer}.hook_out"][prompt, :n], traced[layer][prompt, :n]]
        if layer < subject.n_layers - 1:  # Hugging Face's last entry is after the final norm
            theirs.append(hidden[layer + 1][prompt, :n])
        for other in theirs:
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


def test_arms_of_search_and_steering_say_the_same(subject):
    found = search.measure(subject, tasks=2, candidates=2, new_tokens=3, rounds=1)
    assert "expanded cache 4 of 4, cascade 4 of 4" in found.remarks[0]
    assert {row.name for row in found.rows} == {"plain generate / cascade", "expanded cache / cascade"}
    found = steering.measure(subject, n=3, new_tokens=3, rounds=1)
    assert all(f"{name} 3" in found.remarks[0] for name in steering.BARS)
    assert [row.bar for row in found.rows] == list(steering.BARS.values())


def test_both_ways_of_fitting_probes_reach_the_same_optimum():
    layer = probes.Layer(0, n=40, d=64, labellings=2, loop=6)
    layer.gram()
    layer.scikit_learn()
    assert len(layer.ours) == layer.fits == 40 and len(layer.theirs) == 6
    assert abs(layer.gap()) < 1e-5
    assert layer.gap() < 1e-8


@pytest.mark.slow
def test_the_run_for_a_gpu_goes_through_on_a_cpu(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("<!-- benchmarks.gpu -->\n<!-- end -->\n")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--docs", str(page)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = page.read_text()
    parity = [line for line in text.splitlines() if line.startswith("| parity")]
    assert len(parity) == 6 and all("met" in line for line in parity)
    for row in (
        "bare forward / all layers in memory",
        "MFU of extraction",
        "expanded cache / cascade",
        "a whole study",
    ):
        assert f"| {row}" in text


def test_a_step_that_fails_is_said_and_leaves_the_others_their_turn(monkeypatch, capsys):
    from benchmarks import gpu

    def breaks(*_):
        raise RuntimeError("no such kernel")

    for name in ("parity", "study"):
        monkeypatch.setattr(gpu, name, breaks)
    table = gpu.measure(gpu.TINY, "cpu")
    assert "**parity failed**: RuntimeError: no such kernel" in table.remarks
    assert any(row.name == "MFU of extraction" for row in table.rows)
    assert "study" in capsys.readouterr().err


@pytest.mark.slow
def test_a_busy_neighbour_runs_only_beside_what_is_measured_beside_it(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("<!-- benchmarks.neighbour -->\n<!-- end -->\n")
    small = ["--shape", "tiny", "--prompts", "1", "--new-tokens", "2", "--rounds", "1", "--docs", str(page)]
    subprocess.run([sys.executable, "-m", "benchmarks.neighbour", *small], cwd=ROOT, capture_output=True, check=True)
    rows = [line.split("|")[1:3] for line in page.read_text().splitlines() if line.startswith(("| reading", "| deco"))]
    assert len(rows) == 16 and all(float(value) > 0 for _, value in rows)


def test_medians_of_ratios_are_not_ratios_of_medians():
    a, b = [1.0, 4.0, 9.0], [1.0, 1.0, 9.0]
    assert timing.ratio("x", a, b).value == statistics.median([1.0, 4.0, 1.0])
