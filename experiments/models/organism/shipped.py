"""The organism that comes with the project: trained once, the same on every machine.

Training follows the CPU: the same recipe and seed give another network elsewhere. So the default study reads weights
that were trained once and are kept beside this file, in float16 (10 MB for base, agent and the agent's dose series).
Which seed they are of was settled before any of them was measured: the first one whose stopping rule fires.

They were made by::

    pingscope organism --seed 0 --out ORGANISM
    python -m pingscope.experiments.models.organism.shipped ORGANISM
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pingscope.experiments.models.organism.train import (
    OWN_MARK,
    RECORD,
    Organism,
    clear_folder,
    finished_organism,
)
from pingscope.experiments.models.shipping import check_files, digests
from pingscope.interp.files import read_json, sha256_of, write_json

HERE = Path(__file__).parent / "shipped"
WEIGHTS = "weights.safetensors"  # every tensor of every model, as MODEL/NAME
MODEL = "model.safetensors"


def unpack(out: str | Path) -> Organism:
    """The shipped organism as ordinary Hugging Face folders in ``out``, or as they were left there before.

    Weights are float32 again, so that every number format is available to a study.

    Raises:
        UserError: a shipped file is damaged, or ``out`` holds folders that are not an organism's.
    """
    out, manifest = Path(out), read_json(HERE / "manifest.json")
    key = sha256_of(manifest)
    if (found := finished_organism(out, key)) is not None:
        return found
    check_files(HERE, manifest, "pingscope organism")
    clear_folder(out, key)

    from safetensors.torch import load_file

    tensors = load_file(HERE / WEIGHTS)
    for name in manifest["models"]:
        own = {full.partition("/")[2]: t.float() for full, t in tensors.items() if full.partition("/")[0] == name}
        _write(out / name, own)
    shutil.copytree(out / manifest["models"][-1], out / "agent")
    write_json(out / RECORD, {"key": key, "steps": manifest["steps"], "log": manifest["log"]})
    organism = finished_organism(out, key)
    assert organism is not None
    return organism


def pack(organism: str | Path) -> None:
    """Put a trained organism in the place of the shipped one."""
    from safetensors.torch import load_file, save_file

    folder = Path(organism)
    record = read_json(folder / RECORD)
    models = ["base", *(f"agent-step-{step:03d}" for step in record["steps"])]  # the last step is the agent
    tensors = {
        f"{name}/{key}": tensor.half().contiguous()
        for name in models
        for key, tensor in load_file(folder / name / MODEL).items()
    }
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    save_file(tensors, HERE / WEIGHTS)
    for path in sorted((folder / "base").iterdir()):
        if path.name not in (MODEL, OWN_MARK):
            shutil.copy(path, HERE / path.name)
    manifest = {"models": models, "steps": record["steps"], "recipe": record["key"], "log": record["log"]}
    write_json(HERE / "manifest.json", manifest | {"files": digests(HERE)})


def _write(folder: Path, tensors: dict[str, Any]) -> None:
    """A model's folder through a temporary one and a rename."""
    from safetensors.torch import save_file

    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    for path in HERE.iterdir():
        if path.name not in (WEIGHTS, "manifest.json"):
            shutil.copy(path, temporary / path.name)
    save_file(tensors, temporary / MODEL, {"format": "pt"})
    (temporary / OWN_MARK).touch()
    temporary.chmod(0o755)
    temporary.rename(folder)


if __name__ == "__main__":
    pack(sys.argv[1])
