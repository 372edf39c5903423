"""What a result depends on, as one hash: whoever finds earlier work again asks here whether it is still the same.

Texts, weights, tokenizer, template and its variables, the tokens that end an answer, the number format, the library
behind the model, and the code that decides the outcome. Where a folder lies, and what it is called, is no part of it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pingscope.interp.files import sha256_of
from pingscope.interp.generate.generation import end_ids
from pingscope.interp.model.hooked import HookedModel

ROOM = Path(__file__).resolve().parents[1]  # experiments/
# The files whose code decides an outcome, by the part of the work that they decide.
CODE = {
    "episodes": ("agents", "models/organism/environment.py", "models/organism/world.py"),
    "finetune": ("models/finetune.py",),
    "organism": (),  # its recipe is hashed, and its weights are what counts
}


@cache
def code_version(part: str) -> str:
    """Hex SHA-256 of the source of one of :data:`CODE`'s parts."""
    files = sorted(
        file
        for name in CODE[part]
        for file in ([ROOM / name] if (ROOM / name).is_file() else (ROOM / name).rglob("*.py"))
    )
    return sha256_of([[file.relative_to(ROOM).as_posix(), sha256_of(file.read_bytes())] for file in files])


def tokenizer_identity(tokenizer: object) -> str:
    """Hex SHA-256 of how text becomes tokens: vocabulary, merges, normaliser, added tokens; of no path or name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return sha256_of(backend.to_str().encode())
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return sha256_of([type(tokenizer).__name__, vocabulary])


def model_identity(model: HookedModel) -> str:
    """Hex SHA-256 of everything of a model that decides what it says to given tasks."""
    if getattr(model, "hf", None) is None:  # behind an endpoint: known by its address and name
        return sha256_of([model.fingerprint, model.template_hash])
    return sha256_of(
        {
            "weights": model.fingerprint,
            "tokenizer": tokenizer_identity(model.tokenizer),
            "template": model.template_hash,
            "ends": sorted(end_ids(model)),
            "pad": model.pad_id,
            "dtype": str(model.hf.dtype),
            "backend": model.backend,
        }
    )
