"""Tiny random checkpoints of several families, made here: no network, no GPU.

``checkpoint(family)`` gives a Hugging Face folder (safetensors, tokenizer, chat template), made once per test
session; ``tiny_model`` is the Llama among them as a :class:`pingscope.interp.HookedModel`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from jaxtyping import install_import_hook

# Shapes and types of every annotated function are checked at run time, in these rooms.
_hook = install_import_hook(["pingscope.interp", "pingscope.probes", "pingscope.steering"], "beartype.beartype")

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_models import build_model, train_tokenizer  # noqa: E402

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("qwen2")`` → folder of a tiny random model; families: ``tiny_models.FAMILIES``."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"checkpoint-{family}")
            tokenizer = train_tokenizer()
            build_model(family, len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def load(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """``load("gpt2")`` → the tiny model as a :class:`pingscope.interp.HookedModel`, loaded once."""
    from pingscope.interp import load_model

    loaded: dict[str, Any] = {}

    def get(family: str = "llama") -> Any:
        if family not in loaded:
            loaded[family] = load_model(checkpoint(family), device="cpu")
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def tiny_model(load: Callable[[str], Any]) -> Any:
    """A random Llama of 4 layers x 64."""
    return load("llama")
