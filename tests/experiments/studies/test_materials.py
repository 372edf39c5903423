"""What a study's stages share: both models in one number format, whatever is quick at the moment."""

from __future__ import annotations

from pathlib import Path

import torch

from pingscope.experiments.run.folder import Run
from pingscope.experiments.studies.config import StudyConfig
from pingscope.experiments.studies.materials import open_bench
from pingscope.interp import precision

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_a_fast_precision_is_chosen_once_for_all_models_and_for_a_resumed_run(checkpoint, tmp_path, monkeypatch):
    quick = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_bfloat16_on", lambda device: "this CPU")
    monkeypatch.setattr(precision, "_seconds", lambda hf, ids: quick[hf.dtype])
    folder = str(checkpoint("llama"))
    config = StudyConfig.model_validate(
        {
            "models": {"base": folder, "agent": folder, "dtype": "fast"},
            "tasks": {
                "validation": str(EXAMPLES / "validation.jsonl"),
                "test": str(EXAMPLES / "tasks.jsonl"),
                "probe_prompts": str(EXAMPLES / "probe.jsonl"),
            },
        }
    )
    for _ in range(2):  # the second time found again, on a machine that has slowed down
        bench = open_bench(config, Run(tmp_path / "run", lambda line: None))
        checkpoint_too = bench.load(folder)
        assert {model.hf.dtype for model in (bench.base, bench.agent, checkpoint_too)} == {torch.bfloat16}
        assert bench.config.models.dtype == "bfloat16"  # what a second process is given
        quick[torch.bfloat16] = 3.0
        del bench
