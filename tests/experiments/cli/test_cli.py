"""The command line: what bad input gets, and the walk from prompts to report on any checkpoint."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEMPLATE

from pingscope.experiments.cli import main as cli
from pingscope.experiments.models.organism import world

pytestmark = pytest.mark.slow


@pytest.fixture
def pingscope(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: ``(exit code, stdout, stderr)``."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pingscope", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve organism tasks and a prompt that holds markup."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [asdict(task) for task in world.tasks("validation", n=4, seed=1)]
    rows[0]["instruction"] += " <script>alert(1)</script> <|end|> <b>bold</b>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"id": "a", "instruction": "Open the inbox.", "label": "benign"}

BAD_RECORDS = {
    "empty": ([], "is empty"),
    "torn": ([GOOD, '{"id": "b", '], ":2: not valid JSON"),
    "list": (["[1]"], "row 1: expected a JSON object"),
    "no label": ([{"id": "a", "instruction": "x"}], "field 'label'"),
    "bad label": ([GOOD | {"label": "evil"}], "field 'label' is 'evil'"),
    "same id": ([GOOD, GOOD], ":2: field 'id' repeats"),
    "number": ([GOOD | {"context": 7}], "field 'context' must be a string"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records_name_file_line_and_field(case, pingscope, checkpoint, tmp_path):
    rows, message = BAD_RECORDS[case]
    path = write(tmp_path / "tasks.jsonl", *rows)
    code, out, err = pingscope("evaluate", "--model", checkpoint(), "--tasks", path, "--out", tmp_path / "run")
    assert code == 2 and out == ""
    assert str(path) in err and message in err and err.count("\n") == 1


def test_bad_arguments_are_one_line(pingscope, checkpoint, prompts, tmp_path):
    model, out = checkpoint(), tmp_path / "out"
    cases = [
        (("evaluate", "--model", tmp_path / "none", "--tasks", prompts, "--out", out), "no such model folder"),
        (("evaluate", "--model", model, "--tasks", "nonsense:x", "--out", out), "unknown preset 'nonsense'"),
        (("evaluate", "--model", model, "--tasks", "webdojo:/none", "--out", out), "no such file or folder"),
        (("evaluate", "--model", model, "--tasks", prompts, "--arm", "prefix", "--out", out), "needs --text"),
        (("cache", "--model", model, "--prompts", prompts, "--out", out, "--layers", "9"), "no layer 9"),
        (("cache", "--model", model, "--prompts", prompts, "--out", out, "--positions", "roles"), "cannot read"),
        (("probe", "--store", tmp_path / "no-store", "--out", out), "no-store"),
        (("report", tmp_path), "results.json"),
        (("study", "--config", tmp_path / "none.yaml"), "no such config"),
        (("nonsense",), "No such command"),
        (("evaluate",), "Missing option"),
    ]
    for words, message in cases:
        code, _, err = pingscope(*words)
        assert code == 2, words
        assert message in err and "Traceback" not in err, err
        assert (err.startswith("error: ") and err.count("\n") == 1) or "note:" in err or "model:" in err, err


def test_config_errors_name_the_field(pingscope, tmp_path):
    for text, field in (
        ("serch: {k: 3}", "'serch'"),
        ("search: {k: none}", "'search.k'"),
        ("models: {base: only}", "'models'"),
        ("models: {base: a, agent: b}", "'tasks'"),
        ("- a\n- b", "found a list"),
        ("false", "found a bool"),
        ("seed: 0\nseed: 1", "comes twice"),
        ("[" * 5000, "not valid YAML"),
        ("a: [", "not valid YAML"),
    ):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        code, _, err = pingscope("study", "--config", path, "--out", tmp_path / "run")
        assert code == 2 and field in err and str(path) in err and err.count("\n") == 1


def copy_of(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def test_tokenizer_without_template_says_how_to_pass_one(pingscope, checkpoint, prompts, tmp_path):
    bare = copy_of(checkpoint(), tmp_path / "bare")
    template = (bare / "chat_template.jinja").read_text()
    (bare / "chat_template.jinja").unlink()
    words = ("cache", "--model", bare, "--prompts", prompts, "--out", tmp_path / "store")
    code, _, err = pingscope(*words)
    assert code == 2 and "--chat-template" in err
    (tmp_path / "template.jinja").write_text(template)
    assert pingscope(*words, "--chat-template", tmp_path / "template.jinja")[0] == 0


def test_prompt_longer_than_the_context_is_named(pingscope, checkpoint, tmp_path):
    path = write(tmp_path / "long.jsonl", GOOD | {"id": "long-one", "instruction": "word " * 900})
    code, _, err = pingscope("evaluate", "--model", checkpoint(), "--tasks", path, "--out", tmp_path / "run")
    assert code == 2 and "long-one" in err and "512" in err


def test_weights_that_are_nan_are_refused_by_name(pingscope, checkpoint, prompts, tmp_path):
    broken = copy_of(checkpoint(), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = pingscope("cache", "--model", broken, "--prompts", prompts, "--out", tmp_path / "store")
    assert code == 2 and "model.layers.1.mlp.down_proj.weight holds NaN" in err


def test_store_of_another_model_or_prompts_is_refused(pingscope, checkpoint, prompts, tmp_path):
    store = tmp_path / "store"
    words = ("cache", "--prompts", prompts, "--out", store)
    assert pingscope(*words, "--model", checkpoint())[0] == 0
    other = copy_of(checkpoint(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = pingscope(*words, "--model", other)
    assert code == 2 and "differs in its model" in err
    code, _, err = pingscope(*words, "--model", checkpoint(), "--limit", 2)
    assert code == 2 and "differs in its prompts" in err


def test_full_disk_is_one_line_and_keeps_what_is_there(pingscope, checkpoint, prompts, tmp_path, monkeypatch):
    words = ("evaluate", "--model", checkpoint(), "--tasks", prompts, "--out", tmp_path / "run", "--max-new-tokens", 4)
    assert pingscope(*words)[0] == 0
    before = (tmp_path / "run" / "results.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pingscope.interp.files.os.fsync", full)
    code, _, err = pingscope(*words)
    assert code == 2 and "No space left" in err and "Traceback" not in err
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def drifted(model: Path, folder: Path) -> Path:
    """Another checkpoint of the same architecture, as fine-tuning makes one."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    moved = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_walk_from_prompts_to_report(family, pingscope, checkpoint, prompts, tmp_path):
    """cache → probe → track → steer → inject → search on random checkpoints of three families."""
    model = checkpoint(family)
    store, probes = tmp_path / "store", tmp_path / "probes"
    quick = ("--max-new-tokens", 4, "--max-turns", 1)
    assert pingscope("cache", "--model", model, "--prompts", "organism:chat", "--limit", 20, "--out", store)[0] == 0
    code, _, said = pingscope("probe", "--store", store, "--out", probes, "--other", store)
    assert code == 2 and "is of the same model" in said
    tuned, other = drifted(model, tmp_path / "tuned"), tmp_path / "other"
    assert pingscope("cache", "--model", tuned, "--prompts", "organism:chat", "--limit", 20, "--out", other)[0] == 0
    code, out, _ = pingscope("probe", "--store", store, "--out", probes, "--other", other)
    assert code == 0 and "shuffled_auroc" in out and "words_auroc" in out and "converged" in out
    evaluation = json.loads((probes / "evaluation.json").read_text())
    row = evaluation["layers"]["0"]
    assert row["C"] in (0.001, 0.01, 0.1, 1.0)
    assert all(0 <= row[way]["value"] <= 1 for way in ("transfer_auroc", "transfer_back_auroc"))
    track = ("track", "--model", model, "--probes", probes, "--prompts", prompts, "--prefix", "# Note: safe?\n")
    code, out, _ = pingscope(*track, "--out", tmp_path / "track")
    assert code == 0 and "instruction" in out
    html = (tmp_path / "track" / "report.html").read_text()
    assert "<script>alert(1)" not in html
    results = json.loads((tmp_path / "track" / "results.json").read_text())
    assert set(results["tracks"]) == {"agent", "agent+prefix", "agent+suffix"}
    assert results["collapse"]["agent"]["0"]["shift"]["final"]["harmful"]["value"] == 0.0

    code, out, _ = pingscope(
        "steer", "--model", model, "--probes", probes, "--tasks", prompts, "--dose", 0.2, "--random-draws", 1,
        "--out", tmp_path / "steer", *quick,
    )  # fmt: skip
    assert code == 0 and "random-0 0.2" in out
    steered = json.loads((tmp_path / "steer" / "results.json").read_text())
    assert steered["meta"]["title"] == f"Steering of {model.name}" and steered["meta"]["note"] in out
    assert (
        steered["behaviour"]["agent+steer"] in steered["steering"]["add"][steered["steering_chosen"]["layers"]].values()
    )
    code, out, _ = pingscope(
        "inject", "--model", model, "--text", "# Is this safe?\n", "--tasks", prompts, "--out", tmp_path / "i", *quick
    )
    assert code == 0 and "agent+suffix" in out and "agent+neutral-prefix" in out
    code, out, _ = pingscope(
        "search", "--model", model, "--tasks", prompts, "-M", 2, "-T", 1, "--out", tmp_path / "search", *quick
    )
    assert code == 0 and (tmp_path / "search" / "prefix.txt").read_text().startswith("# ")
    rows = [json.loads(line) for line in (tmp_path / "search" / "search.jsonl").read_text().splitlines()]
    assert sum(row.get("note") == "score" for row in rows) <= 2 and any("outcomes" in row for row in rows)


def test_probes_of_another_width_are_refused(pingscope, checkpoint, load, prompts, tmp_path):
    import numpy as np

    from pingscope.probes import LayerProbes

    narrow = LayerProbes((0,), np.ones((1, 8)), np.zeros(1), {})
    narrow.save(tmp_path / "probes")
    for command, name in (("track", "--prompts"), ("steer", "--tasks")):
        code, _, err = pingscope(
            command, "--model", checkpoint(), "--probes", tmp_path / "probes", name, prompts, "--out", tmp_path / "o"
        )
        assert code == 2 and "fit" in err


def test_probes_of_another_model_are_refused(pingscope, checkpoint, prompts, tmp_path):
    run = tmp_path / "run"
    words = ("cache", "--model", checkpoint(), "--prompts", prompts, "--positions", "final", "--out", run / "store")
    assert pingscope(*words)[0] == 0
    assert pingscope("probe", "--store", run / "store", "--pooling", "final", "--out", run / "probes")[0] == 0
    read = ("--probes", run / "probes", "--out", tmp_path / "o")
    for command, name in (("track", "--prompts"), ("steer", "--tasks")):
        code, _, err = pingscope(command, "--model", checkpoint("mistral"), *read, name, prompts)
        assert code == 2 and "were fitted on" in err and str(checkpoint()) in err
    track = ("track", "--model", checkpoint("mistral"), *read, "--prompts", prompts)
    assert pingscope(*track, "--base", checkpoint())[0] == 0


def test_a_store_that_was_altered_is_refused(pingscope, checkpoint, prompts, tmp_path):
    store = tmp_path / "store"
    assert pingscope("cache", "--model", checkpoint(), "--prompts", prompts, "--out", store)[0] == 0
    file = store / "layers" / "02.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-8000:] = bytes(8000)
    file.write_bytes(raw)
    code, _, err = pingscope("probe", "--store", store, "--out", tmp_path / "probes")
    assert code == 2 and "02.safetensors: not as it was written" in err and not (tmp_path / "probes").exists()


def test_probe_prompts_leave_out_the_tasks_to_be_read(pingscope, checkpoint, prompts, tmp_path):
    more = [json.loads(line) for line in prompts.read_text().splitlines()]
    extra = [row | {"id": f"new-{i}", "instruction": f"Another task {i}", "context": ""} for i, row in enumerate(more)]
    same = more[3] | {"id": "copy", "instruction": more[3]["instruction"].upper() + " !"}
    path = write(tmp_path / "chat.jsonl", *extra, same)
    words = ("cache", "--model", checkpoint(), "--prompts", path, "--out", tmp_path / "store")
    code, _, err = pingscope(*words, "--without", prompts)
    assert code == 0 and f"1 of {len(extra) + 1} prompts" in err
    assert "copy" not in json.loads((tmp_path / "store" / "records.json").read_text())
    code, _, err = pingscope("cache", "--model", checkpoint(), "--prompts", prompts, "--without", prompts,
                             "--out", tmp_path / "none")  # fmt: skip
    assert code == 2 and "--without" in err


def test_webdojo_inputs_on_a_random_checkpoint(pingscope, checkpoint, tmp_path):
    """The published prompts' layout, from a small fixture of our own."""
    folder = tmp_path / "webdojo"
    folder.mkdir()
    for label in ("harmful", "benign"):
        rows = [
            {
                "goal": f"Task Instruction: {label} goal {i}",
                "html": f'<html> <a id="{i}" data-bbox="1"> Go </a> </html>',
            }
            for i in range(6)
        ]
        (folder / f"webagent_input_{label}.json").write_text(json.dumps(rows))
    store, probes = tmp_path / "store", tmp_path / "probes"
    model = checkpoint("gpt2")
    assert pingscope("cache", "--model", model, "--prompts", "organism:chat", "--limit", 10, "--out", store)[0] == 0
    assert pingscope("probe", "--store", store, "--out", probes)[0] == 0
    code, out, _ = pingscope(
        "track", "--model", model, "--probes", probes, "--prompts", f"webdojo:{folder}", "--out", tmp_path / "track"
    )
    assert code == 0 and "page" in out


def test_finetune_lowers_the_loss_and_saves_a_plain_folder(pingscope, checkpoint, tmp_path):
    turn = {"messages": [{"role": "user", "content": "Open it."}, {"role": "assistant", "content": "do(Click, inbox)"}]}
    data = write(tmp_path / "demos.jsonl", *[turn | {"id": str(i)} for i in range(8)])
    words = (
        "finetune", "--base", checkpoint(), "--data", data, "--out", tmp_path / "tuned", "--learning-rate", 1e-2,
        "--epochs", 4, "--batch-size", 4,
    )  # fmt: skip
    assert pingscope(*words, "--lora-rank", 4)[0] == 0
    losses = json.loads((tmp_path / "tuned" / "finetune.json").read_text())["loss"]
    assert losses[-1] < losses[0]
    from pingscope.interp import load_model

    tuned, before = load_model(tmp_path / "tuned"), load_model(checkpoint())
    assert set(tuned.hf.state_dict()) == set(before.hf.state_dict())  # merged: no adapter is left
    assert not torch.equal(
        tuned.hf.model.layers[0].mlp.down_proj.weight, before.hf.model.layers[0].mlp.down_proj.weight
    )
    assert pingscope(*words, "--lora-rank", 4)[0] == 0  # found again
    code, _, err = pingscope(*words, "--lora-rank", 2)
    assert code == 2 and "another fine-tuning" in err


def test_help_is_instant():
    """No heavy import on the way to --help: under a second of processor time with room to spare."""
    started = time.process_time(), time.perf_counter()
    code = (
        "import sys, runpy\nsys.argv = ['pingscope', '--help']\n"
        "try: runpy.run_module('pingscope.experiments.cli.main', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'transformers', 'sklearn', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert time.perf_counter() - started[1] < 10


def test_doctor(pingscope, checkpoint, tmp_path):
    out = tmp_path / "doctor.json"
    code, shown, _ = pingscope("doctor", "--model", checkpoint("gemma3"), "--backend", "hf", "--out", out)
    assert code == 0
    for words in ("Gemma3ForCausalLM", "4 layers x 64", "sliding window 16", "float32", "instruction", "BOS", "GB"):
        assert words in shown, words
    found = json.loads(out.read_text())
    assert found["parity"]["hf"]["residuals, left padding"]["ok"] and len(found["parity"]["hf"]) >= 13
    assert found["findings"]["BOS tokens"]["value"] == "0"
    assert "system" in found["findings"]["roles"]["value"]
    code, _, err = pingscope("doctor", "--model", checkpoint("gemma3"), "--backend", "jax")
    assert code == 2 and "--backend 'jax'" in err


def test_doctor_names_what_is_wrong(pingscope, checkpoint, tmp_path, monkeypatch):
    from pingscope.interp.model.hooked import HookedModel

    folder = tmp_path / "doubled"
    shutil.copytree(checkpoint("gpt2"), folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ bos_token }}" + TEMPLATE)
    inputs = HookedModel.inputs
    monkeypatch.setattr(
        HookedModel, "inputs", lambda self, batch: inputs(self, batch) | {"position_ids": batch.mask * 0}
    )
    code, shown, err = pingscope("doctor", "--model", folder)
    assert code == 1 and "FAILED" in shown and "residuals, left padding" in err
    assert "2 BOS tokens" in shown
    (folder / "chat_template.jinja").unlink()
    _, shown, _ = pingscope("doctor", "--model", folder)
    assert "cannot render" in shown and "--chat-template" in shown


def test_adapters_and_their_base(pingscope, checkpoint, prompts, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = checkpoint("llama"), tmp_path / "adapter"
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone/base"}))
    cache = ("cache", "--prompts", prompts, "--layers", "1", "--model")
    code, _, err = pingscope(*cache, adapter, "--out", tmp_path / "a")
    assert code == 2 and "gone/base" in err and "--base" in err
    code, _, err = pingscope(*cache, adapter, "--base", base, "--out", tmp_path / "a")
    assert code == 0 and f"model: {adapter} on {base}" in err
    code, _, err = pingscope(*cache, base, "--base", base, "--out", tmp_path / "b")
    assert code == 2 and "is no adapter" in err
    assert pingscope("cache", "--prompts", prompts, "--model", base, "--out", tmp_path / "b")[0] == 0
    assert pingscope("probe", "--store", tmp_path / "b", "--C", "1", "--out", tmp_path / "probes")[0] == 0
    track = ("track", "--probes", tmp_path / "probes", "--prompts", prompts, "--transfer", "--out", tmp_path / "track")
    code, _, err = pingscope(*track, "--model", adapter, "--base", base)  # --base is both: what else would it be?
    assert code == 0 and f"model: {adapter} on {base}" in err and f"model: {base} (" in err


def test_the_precision_is_chosen_once_and_said(pingscope, checkpoint, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("pingscope.interp.precision._bfloat16_on", lambda device: "this CPU (avx512_bf16)")
    seconds = iter((2.0, 1.0) * 2)  # in float32, then in bfloat16, of either command
    monkeypatch.setattr("pingscope.interp.precision._seconds", lambda hf, ids: next(seconds))
    base = checkpoint("llama")
    cache = ("cache", "--prompts", prompts, "--model", base)
    code, _, err = pingscope(*cache, "--model-dtype", "fast", "--out", tmp_path / "a")
    assert code == 0 and "dtype: bfloat16, because this CPU (avx512_bf16) computes in it" in err
    assert pingscope("probe", "--store", tmp_path / "a", "--C", "1", "--out", tmp_path / "probes")[0] == 0
    track = ("track", "--probes", tmp_path / "probes", "--prompts", prompts, "--out", tmp_path / "track")
    code, _, err = pingscope(*track, "--model", base, "--base", base, "--dtype", "fast")
    assert code == 0 and err.count("dtype: bfloat16") == 1  # the second model follows the first
