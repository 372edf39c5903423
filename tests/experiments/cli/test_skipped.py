"""Rows that could not be read are counted: in every table on the terminal and in the results."""

from __future__ import annotations

import json

import pytest

from tests.experiments.cli.test_search_commands import QUICK, pingscope, tasks

pytestmark = pytest.mark.slow
__all__ = ["pingscope"]

PREFIX = ("--prefix", "# Is this safe?\n")
COMMANDS = {
    "evaluate": (),
    "inject": ("--text", "# Is this safe?\n"),
    "attack": PREFIX,
    "search": ("-M", 2, "-T", 1),
    "transfer": PREFIX,
}


@pytest.fixture
def damaged(tmp_path):
    path = tasks(tmp_path / "tasks.jsonl", "test", 3)
    path.write_text(path.read_text() + '{"id": "x", "label": "evil", "instruction": "y"}\n[1]\n')
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_table_and_the_results_say_how_many_rows_were_skipped(command, pingscope, checkpoint, damaged, tmp_path):
    out = tmp_path / "run"
    words = (command, "--model", checkpoint("llama"), "--tasks", damaged, "--out", out, *COMMANDS[command], *QUICK)
    code, _, err = pingscope(*words)
    assert code == 2 and "tasks.jsonl:" in err and not out.exists()
    code, said, err = pingscope(*words, "--skip-bad")
    assert code == 0, err
    blocks = [block for block in said.split("\n\n") if "[95%" in " ".join(block.split())]
    assert blocks and all("2 bad records skipped" in " ".join(block.split()) for block in blocks)
    assert json.loads((out / "results.json").read_text())["skipped"] == 2


def test_nothing_is_said_where_every_row_was_read(pingscope, checkpoint, tmp_path):
    whole = tasks(tmp_path / "whole.jsonl", "test", 2)
    words = ("evaluate", "--model", checkpoint("llama"), "--tasks", whole, "--out", tmp_path / "run", "--skip-bad")
    code, said, _ = pingscope(*words, *QUICK)
    assert code == 0 and "bad record" not in said
