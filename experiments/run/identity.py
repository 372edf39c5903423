"""What a result depends on, as one hash: whoever finds earlier work again asks here whether it is still the same.

Texts, weights, tokenizer, template and its variables, the tokens that end an answer, the number format, the library
behind the model, and the code that decides the outcome. Where a folder lies, and what it is called, is no part of it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pingscope.interp.chat.tokenizer import tokenizer_identity
from pingscope.interp.files import sha256_of
from pingscope.interp.generate.generation import end_ids
from pingscope.interp.model.hooked import HookedModel

PACKAGE = Path(__file__).resolve().parents[2]
_RENDERING = ("interp/chat", "interp/generate", "interp/model/hooks.py")
# The files whose code decides an outcome, by the part of the work that they decide. Too much is harmless: work is done
# again. Too little would pass old answers off as new ones.
_EPISODES = (
    *_RENDERING,
    "steering/injection.py",
    "steering/soft_prefix.py",
    "steering/gates.py",
    "steering/decisions.py",
    "steering/operators.py",
    "steering/realignment.py",
    "experiments/agents",
    "experiments/models/organism/environment.py",
    "experiments/models/organism/world.py",
)
CODE = {
    "episodes": _EPISODES,
    "study": (
        *("interp", "probes", "steering", "experiments/agents", "experiments/models/organism", "experiments/studies"),
        "experiments/tasks",
    ),
    "search": (*_EPISODES, "experiments/studies/search/prefix_table.py"),
    "finetune": ("interp/chat", "experiments/models/finetune.py", "experiments/models/low_rank.py"),
}


@cache
def code_version(part: str) -> str:
    """Hex SHA-256 of the source of one of :data:`CODE`'s parts."""
    named = [PACKAGE / name for name in CODE[part]]
    files = sorted(file for path in named for file in ([path] if path.is_file() else path.rglob("*.py")))
    return sha256_of([[file.relative_to(PACKAGE).as_posix(), sha256_of(file.read_bytes())] for file in files])


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
