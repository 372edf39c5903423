"""What of a tokenizer decides how text becomes tokens."""

from __future__ import annotations

import json
from typing import Any

from pingscope.interp.files import sha256_of


def tokenizer_identity(tokenizer: Any) -> str:
    """Hex SHA-256 of vocabulary, merges, normaliser and added tokens; of no path, and of nothing that a call leaves.

    Padding and truncation are settings of the latest call, kept in the same file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        return sha256_of([type(tokenizer).__name__, vocabulary])
    facts = json.loads(backend.to_str())
    return sha256_of({name: value for name, value in facts.items() if name not in ("padding", "truncation")})
