"""Where the decoder is in an architecture whose names are not known: found by structure, proved by a forward pass.

The blocks are the one list as long as the text configuration says, in a module built from that configuration (not a
vision or audio tower). :func:`pingscope.interp.model.check.check_forward` then holds them to the model's own numbers.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")  # names of the number of blocks in configurations


def text_config(hf: Any) -> Any:
    """The configuration of the text decoder (the model's own, or its text tower's)."""
    return hf.config.get_text_config(decoder=True)


def depths(config: Any) -> set[int]:
    """How many blocks a configuration may mean; some count two parts of a block as layers of their own (LongCat)."""
    return {int(n) for name in DEPTHS if isinstance(n := getattr(config, name, None), int)}


def takes(module: Any, name: str) -> bool:
    """Whether the forward pass of a module's class has a parameter of that name."""
    return name in inspect.signature(type(module).forward).parameters


def text_model(hf: Any) -> Any:
    """``hf``, or the causal language model inside it where its own forward pass cannot do without an image or audio."""
    _, *given = inspect.signature(type(hf).forward).parameters.values()
    needs = [p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if not set(needs) - {"input_ids", "attention_mask"}:
        return hf
    inside = [
        m for m in hf.modules() if m is not hf and callable(getattr(m, "generate", None)) and hasattr(m, "config")
    ]
    return next((m for m in inside if m.get_output_embeddings() is not None and takes(m, "input_ids")), hf)


def find_blocks(hf: Any) -> str:
    """Path of the one list that can be the decoder blocks; empty where there is none or a choice."""
    config, found = text_config(hf), list[str]()
    owner = {"": config}
    for name, module in hf.named_modules():
        above = name.rpartition(".")[0]
        owner[name] = getattr(module, "config", None) or owner.get(above, config)
        fits = isinstance(module, nn.ModuleList) and len(module) in depths(config)
        if not fits or type(owner[name]) not in (type(config), type(hf.config)):
            continue
        if not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found[0] if len(found) == 1 else ""


def find_base(hf: Any, blocks: str) -> str:
    """Path of the outermost module around the blocks, below the head, whose forward pass takes ids."""
    path = ""
    for name in blocks.split(".")[:-1]:
        path = f"{path}.{name}".lstrip(".")
        module = hf.get_submodule(path)
        if takes(module, "input_ids") and not takes(module, "labels"):
            return path
    return blocks.split(".")[0]


def find_embedding(hf: Any) -> str:
    """Path of the token embedding; empty where the model does not name one."""
    try:
        wanted = hf.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return ""
    return next((name for name, module in hf.named_modules() if module is wanted), "")
