"""From a hub id or a folder to a model: weights from safetensors only, no code from the checkpoint unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pingscope.interp.backends import adopt, check_backend, wrap
from pingscope.interp.errors import UserError
from pingscope.interp.model.hooked import HookedModel


def load_model(
    path_or_id: str | Path | Any,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "hf",
    remote: bool | str = False,
    copy: bool = True,
    chat_template: str | Path | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
) -> HookedModel:
    """Load a folder or hub id: weights from safetensors only, no code from the checkpoint unless asked for.

    Args:
        path_or_id: or a :class:`HookedModel` or ``TransformerBridge``, to be used through another ``backend``.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda:1``, …; ``sharded`` spreads the layers over all
            GPUs and, where they do not fit, the memory and the disk (``device_map="auto"``).
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``. Checkpoints stored in 8 or 4 bits
            stay so; the library that made them must be installed.
        backend: ``hf``, ``transformer_lens`` or ``nnsight``, see :mod:`pingscope.interp.backends`.
        remote: with nnsight, ``True`` runs on NDIF: only the configuration and tokenizer are loaded here.
        copy: of a loaded model, before transformer_lens rewrites its modules.
        chat_template: a file with a Jinja template, or the template itself.
        blocks: path of the decoder blocks, for an architecture that is not known.

    Raises:
        UserError: a folder that does not exist or lacks weights, an unknown hub id, a bad option.
    """
    check_backend(backend, remote)
    if not isinstance(path_or_id, str | Path):
        return adopt(path_or_id, backend, copy=copy, remote=remote)
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    name = str(path_or_id)
    folder = Path(name).expanduser()
    local = folder.exists()
    # "runs/base" reads as a hub id too: it is a folder to whoever has a folder "runs".
    folder_like = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not local and (folder_like or ("/" in name and folder.parent.is_dir())):
        raise UserError(f"{name}: no such model folder; give a folder with config.json or a hub id")
    if local and not (folder / "config.json").is_file():
        raise UserError(f"{name}: not a model folder (no config.json); give the folder that holds it")
    dtypes = {"auto": "auto"} | {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype!r}: unknown; use one of {', '.join(dtypes)}")
    source = str(folder) if local else name
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    placement = {"device_map": "auto"} if device == "sharded" else {}
    hf: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        if chat_template is not None:
            tokenizer.chat_template = _read_template(chat_template)
        if remote is True:
            from pingscope.interp.backends.nnsight import remote_model

            return remote_model(name, tokenizer, revision, blocks)
        config = AutoConfig.from_pretrained(source, **common)
        # Vision-language models have a class of their own; their text tower is what is read.
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(
            config, "auto_map", {}
        )
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        hf = auto.from_pretrained(
            source,
            dtype=dtypes[dtype],
            use_safetensors=True,  # never a pickle
            attn_implementation=attn_implementation,
            **placement,
            **common,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{name}: cannot load the model ({reason})") from error
    if device != "sharded" and not getattr(hf, "is_quantized", False):  # quantised weights are placed as they load
        try:
            hf.to(_device(device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r}: {str(error).splitlines()[0]}; use auto or cpu") from error
    return wrap(HookedModel(hf, tokenizer, name=name, blocks=blocks), backend, remote)


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_template(chat_template: str | Path) -> str:
    text = str(chat_template)
    if "{%" in text or "{{" in text:
        return text
    try:
        return Path(text).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {text}: cannot read the file ({error}); give a Jinja file") from error
