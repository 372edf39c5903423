"""The adapters of SmolLM2 that come with the project, in float16: alignment, agent, and the agent on its way.

Trained with the settings of the recipe; the way to make them anew::

    pingscope study --real --train --out STUDY
    python -m pingscope.experiments.models.real.shipped STUDY/models
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from pingscope.experiments.models.real.models import RealModels, Say, fetched, found_models, merge_base
from pingscope.experiments.models.shipping import check_files, digests
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, sha256_of, write_json

HERE = Path(__file__).parent / "shipped"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMOLLM2, BASE = "smollm2", "base"  # the folders that the adapters are put on
STEPS = (15,)  # of the agent's kept steps those that ship: 12 MB hold no more


def unpack(out: Path, say: Say) -> RealModels:
    """SmolLM2, fetched, with the shipped adapters in ``out``, or as they were left there before.

    Raises:
        UserError: a shipped file is damaged, none ships, or the model cannot be had.
    """
    if not (HERE / "manifest.json").is_file():
        raise UserError("real: no adapters ship with this version; train them: pingscope study --real --train")
    out, manifest = out.resolve(), read_json(HERE / "manifest.json")
    check_files(HERE, manifest, "pingscope study --real --train")
    fetched(out, say)
    for folder, config in manifest["adapters"].items():
        on = SMOLLM2 if folder == "base-adapter" else BASE
        _write(out / folder, HERE / f"{_flat(folder)}.safetensors", config | {"base_model_name_or_path": str(out / on)})
    write_json(out / "base-adapter" / "finetune.json", {"identity": sha256_of(manifest["files"])})
    merge_base(out)
    return found_models(out, manifest["log"])


def pack(models: Path, log: dict[str, Any]) -> None:
    """Put trained adapters in the place of the shipped ones."""
    from safetensors.torch import load_file, save_file

    steps = [path.name for step, path in found_models(models, log).checkpoints if step in STEPS]
    folders = ["base-adapter", "agent", *(f"agent/{name}" for name in steps)]
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    configs = {}
    for folder in folders:
        tensors = load_file(models / folder / WEIGHTS)
        save_file({name: tensor.half() for name, tensor in tensors.items()}, HERE / f"{_flat(folder)}.safetensors")
        configs[folder] = read_json(models / folder / CONFIG)
        del configs[folder]["base_model_name_or_path"]  # a folder of this machine; where it is unpacked it gets another
    write_json(HERE / "manifest.json", {"adapters": configs, "log": log, "files": digests(HERE)})


def _write(folder: Path, weights: Path, config: dict[str, Any]) -> None:
    """A PEFT folder, in float32 as the library trains it."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def _flat(folder: str) -> str:
    return folder.replace("/", "-")


if __name__ == "__main__":
    from pingscope.schema import load_results

    made = Path(sys.argv[1])
    pack(made, load_results(made.parent / "results.json").plain()["meta"]["real"])
