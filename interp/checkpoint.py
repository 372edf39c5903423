"""What a folder of weights holds, before anything is loaded: whole files, one model, and no pickles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json

CONFIG, ADAPTER, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.pt", "consolidated*.pth")


@dataclass(frozen=True)
class Source:
    """Where the parts of one model come from.

    Attributes:
        weights: a folder or hub id; gguf: the file in it, where the weights are one.
        adapter: the PEFT folder whose change is put on ``weights``.
    """

    weights: str
    gguf: str = ""
    adapter: Path | None = None


def find_source(name: str, base: str | None = None) -> Source:
    """The parts of the model called ``name``; of a folder every file is looked at, of a hub id nothing is.

    Args:
        base: the model that an adapter is put on (default: the one its configuration names).

    Raises:
        UserError: no model there, weights that are pickled, damaged or not all there, an adapter without its base.
    """
    path = Path(name).expanduser()
    place, colon, file = name.rpartition(":")
    if colon and file.endswith(".gguf") and not path.exists() and base is None:
        return _gguf_in(place, file)
    if not path.exists():
        # "runs/base" reads as a hub id too: it is a folder to whoever has a folder "runs".
        folder_like = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")
        if folder_like or ("/" in name and path.parent.is_dir()):
            raise UserError(f"{name}: no such model folder; give a folder with {CONFIG} or a hub id")
    elif (path / ADAPTER).is_file():
        if whole := list(path.glob("model*.safetensors")):  # transformers would read the adapter's base instead
            raise UserError(
                f"{path}: holds a model ({whole[0].name}) and an adapter ({ADAPTER}); put the adapter's files into a "
                "folder of their own"
            )
        return Source(_base_of(path, base), adapter=path)
    if base is not None:
        raise UserError(f"{name}: is no adapter (no {ADAPTER}), so base {base!r} has no meaning; leave it out")
    if not path.exists():
        return Source(name)
    if path.is_file():
        return _single_file(path)
    if not (path / CONFIG).is_file():
        return _without_config(path)
    check_files(path)
    return Source(str(path))


def check_files(folder: Path) -> None:
    """Refuse shards that are missing or damaged, and weights that are pickled only."""
    shards = sorted(folder.glob("model*.safetensors"))
    if (folder / INDEX).is_file():
        shards = _indexed(folder)
    if not shards and (pickles := _pickles(folder)):
        raise UserError(
            f"{folder}: its weights are pickled ({pickles[0].name}), which can run code when read; convert them once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW) in a safe place"
        )
    if not shards and not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds {CONFIG} but no weights (*.safetensors); copy or download them again")
    for shard in shards:
        tensor_names(shard)


def tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file; its header is read, and its length compared with it.

    Raises:
        UserError: a file that is missing, cut off or not safetensors.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged safetensors ({_short(error)}); copy or download it again") from error


def _indexed(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{folder / INDEX}: field weight_map is no list of tensors and files; download it again")
    shards = sorted({folder / file for file in placed.values()})
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{folder / INDEX}: names {shard.name}, which is not there; copy or download that file")
        held = tensor_names(shard)
        for tensor, file in placed.items():
            if file == shard.name and tensor not in held:
                raise UserError(f"{shard}: lacks the tensor {tensor} that {INDEX} places there; download both again")
    return shards


def _base_of(adapter: Path, base: str | None) -> str:
    """The model an adapter belongs to: a hub id, or a folder as named, or beside the adapter."""
    settings = read_json(adapter / ADAPTER)
    named = base or (settings.get("base_model_name_or_path") if isinstance(settings, dict) else None)
    if not named or not isinstance(named, str):
        raise UserError(
            f"{adapter / ADAPTER}: field base_model_name_or_path is empty; pass the base model as --base (base=…)"
        )
    if pickled := not list(adapter.glob("adapter_model*.safetensors")) and _pickles(adapter):
        raise UserError(f"{adapter}: its weights are pickled ({pickled[0].name}); save the adapter as safetensors")
    beside = adapter / named
    found = str(beside) if not Path(named).expanduser().exists() and beside.is_dir() else named
    try:
        source = find_source(found)
    except UserError as error:
        raise UserError(
            f"{adapter}: an adapter of {named}, which does not load ({error}); pass --base (base=…)"
        ) from error
    if source.adapter or source.gguf:
        raise UserError(f"{adapter}: an adapter of {named}, which is no plain model; merge that one first")
    return source.weights


def _single_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return _gguf(path)
    holder = path.parent if (path.parent / CONFIG).is_file() else "the folder with config.json"
    raise UserError(f"{path}: a file; give the model's folder ({holder})")


def _without_config(path: Path) -> Source:
    """A folder that is no model itself: one GGUF file, or a model deeper inside."""
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _gguf(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4])
        raise UserError(f"{path}: holds {len(ggufs)} GGUF files ({names}); give one of them")
    deeper = sorted(file.parent for kind in (CONFIG, ADAPTER) for file in path.glob(f"*/{kind}"))
    deeper += sorted(file.parent for file in path.glob(f"*/*/{CONFIG}")) if not deeper else []
    if deeper:
        raise UserError(f"{path}: not a model folder (no {CONFIG}); did you mean {' or '.join(map(str, deeper[:3]))}?")
    raise UserError(f"{path}: not a model folder (no {CONFIG}); give the folder that holds it")


def _gguf_in(place: str, file: str) -> Source:
    """``hub_id:file.gguf``; a folder does as well."""
    folder = Path(place).expanduser()
    if folder.is_dir() and not (folder / file).is_file():
        there = ", ".join(sorted(one.name for one in folder.glob("*.gguf"))[:4]) or "none"
        raise UserError(f"{place}:{file}: no such file in the folder (GGUF files there: {there}); name one of them")
    if folder.is_dir():
        return _gguf(folder / file)
    if place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise UserError(f"{place}:{file}: neither a folder nor a hub id; give OWNER/NAME:{file} or the file's path")
    needs_gguf(f"{place}:{file}")
    return Source(place, gguf=file)


def _gguf(file: Path) -> Source:
    needs_gguf(str(file))
    return Source(str(file.parent), gguf=file.name)


def needs_gguf(name: str) -> None:
    """Refuse ``name`` where the package that reads GGUF files is not installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise UserError(f"{name}: GGUF needs the package gguf (pip install gguf), or the model's safetensors folder")


def _pickles(folder: Path) -> list[Path]:
    return sorted(file for pattern in PICKLES for file in folder.glob(pattern))


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:160]
