"""From a hub id, a folder, an adapter or a GGUF file to a model whose weights are all those of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pingscope.interp.backends import adopt, check_backend, wrap
from pingscope.interp.chat.template import configure
from pingscope.interp.checkpoint import Source, find_source
from pingscope.interp.errors import UserError
from pingscope.interp.gguf import Header, as_plain, check_gguf, mend_tokenizer
from pingscope.interp.memory import check_fits, weight_bytes
from pingscope.interp.model.adapters import with_adapter
from pingscope.interp.model.hooked import HookedModel
from pingscope.interp.model.weights import in_short, load_checked
from pingscope.interp.precision import choose_precision


def load_model(
    path_or_id: str | Path | Any,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "hf",
    remote: bool | str = False,
    copy: bool = True,
    chat_template: str | Path | None = None,
    template_name: str | None = None,
    template_variables: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    base: str | Path | None = None,
) -> HookedModel:
    """Load a folder or hub id: weights from safetensors only, no code from the checkpoint unless asked for.

    Args:
        path_or_id: or a :class:`HookedModel` or ``TransformerBridge``, to be used through another ``backend``.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda:1``, …; ``sharded`` spreads the layers over all
            GPUs and, where they do not fit, the memory and the disk (``device_map="auto"``).
        dtype: ``auto`` (as stored; a GGUF in float32), ``float32``, ``bfloat16``, ``float16``, or ``fast``: bfloat16
            where the processor computes in it and the model's predictions stay, else float32; the model's attribute
            ``precision`` says which and why. Checkpoints stored in 8 or 4 bits stay so; the library that made them
            must be installed.
        backend: ``hf``, ``transformer_lens`` or ``nnsight``, see :mod:`pingscope.interp.backends`.
        remote: with nnsight, ``True`` runs on NDIF: only the configuration and tokenizer are loaded here.
        copy: of a loaded model, before transformer_lens rewrites its modules.
        chat_template: a file with a Jinja template, or the template itself.
        template_name: of the tokenizer's chat templates, where it has several.
        template_variables: passed to the template in every rendering, such as ``{"enable_thinking": False}``.
        blocks: path of the decoder blocks, for an architecture that is not known.
        base: of a PEFT folder, the model that it is put on (default: the one that its configuration names). The
            adapter is merged: what is read is an ordinary model, and its fingerprint covers both.

    Raises:
        UserError: a folder that does not exist, weights that are missing, left over, damaged, pickled, not finite or
            all zero (by tensor name), an unknown hub id, a bad option.
    """
    check_backend(backend, remote)
    if not isinstance(path_or_id, str | Path):
        return adopt(path_or_id, backend, copy=copy, remote=remote)
    read_as = _dtype_of(dtype, device)
    name = str(path_or_id)
    source = find_source(name, None if base is None else str(base))
    if source.adapter is not None:
        name = f"{name} on {source.weights}"
    if source.adapter is not None and remote is True:
        raise UserError(f"{name}: an adapter cannot run on another machine; merge it into its base first")
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    header = None
    if source.gguf:
        source = _at_hand(source, name, revision)
        common["gguf_file"] = source.gguf
        header = check_gguf(Path(source.weights) / source.gguf)
    tokenizer = _tokenizer(source, name, common, header)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if template_name is not None or template_variables:
        configure(tokenizer, template_name, template_variables)
    if remote is True:
        from pingscope.interp.backends.nnsight import remote_model

        return remote_model(name, tokenizer, revision, blocks)
    if device != "sharded" and Path(source.weights).is_dir():
        check_fits(name, weight_bytes(Path(source.weights), source.gguf, dtype))
    hf = _weights(source, name, read_as, device, attn_implementation, common, header)
    if header is not None:
        as_plain(hf)
    if getattr(hf, "_hf_peft_config_loaded", False):
        raise UserError(f"{name}: a PEFT adapter on the hub; download it and give its folder, with base=… if needed")
    if source.adapter is not None:
        hf = with_adapter(hf, source.adapter, name, source.weights)
    quantised = bool(getattr(hf, "is_quantized", False))
    if device != "sharded" and not quantised:  # quantised weights are placed as they load
        _place(hf, device)
    why = choose_precision(hf, tokenizer) if dtype == "fast" and not quantised else ""
    model = wrap(HookedModel(hf, tokenizer, name=name, blocks=blocks), backend, remote)
    model.precision = why
    return model


def _dtype_of(dtype: str, device: str) -> Any:
    """What the weights are read as; ``fast`` starts from float32, which it compares with."""
    dtypes = {"auto": "auto", "fast": torch.float32}
    dtypes |= {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16")}
    if dtype == "fast" and device == "sharded":
        raise UserError("dtype 'fast': compares two precisions on one device; with device 'sharded' give bfloat16")
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype!r}: unknown; use one of {', '.join(dtypes)}")
    return dtypes[dtype]


def _place(hf: Any, device: str) -> None:
    try:
        hf.to(_device(device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r}: {str(error).splitlines()[0]}; use auto or cpu") from error


def _at_hand(source: Source, name: str, revision: str | None) -> Source:
    """The folder of a GGUF file, which is downloaded where it is one of the hub's."""
    if Path(source.weights).is_dir():
        return source
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(source.weights, source.gguf, revision=revision))
    except Exception as error:  # of the network or of the hub, of many classes
        raise UserError(f"{name}: cannot get the file from the hub ({in_short(error)}); give a local one") from error
    return Source(str(file.parent), gguf=file.name)


def _tokenizer(source: Source, name: str, common: dict[str, Any], header: Header | None) -> Any:
    """The tokenizer beside the weights; an adapter's own, where it has one."""
    from transformers import AutoTokenizer

    own = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.adapter) if own else source.weights, **common)
    except Exception as error:  # a foreign file makes the library fail in any way
        raise _unreadable(name, "model's tokenizer", error, header, source) from error
    if header is not None:
        mend_tokenizer(tokenizer, header)
    return tokenizer


def _unreadable(name: str, what: str, error: Exception, header: Header | None, source: Source) -> UserError:
    """Of a GGUF file the architecture is said: that is what transformers knows or does not know."""
    if header is None:
        remedy = "; pass its base by --base (base=…)" if source.adapter else ""
        return UserError(f"{name}: cannot load the {what} ({in_short(error)}){remedy}")
    return UserError(
        f"{name}: transformers cannot load the {what} from a GGUF of architecture {header.architecture!r} "
        f"({in_short(error)}); give the model's safetensors folder or hub id"
    )


def _weights(
    source: Source,
    name: str,
    dtype: Any,
    device: str,
    attention: str | None,
    common: dict[str, Any],
    header: Header | None,
) -> Any:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    try:
        config = AutoConfig.from_pretrained(source.weights, **common)
    except Exception as error:  # a foreign file makes the library fail in any way
        raise _unreadable(name, "model", error, header, source) from error
    # Vision-language models have a class of their own; their text tower is what is read.
    remote_code = getattr(config, "auto_map", None) or {}
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote_code
    return load_checked(
        AutoModelForCausalLM if causal else AutoModelForImageTextToText,
        source.weights,
        name,
        dtype=dtype,
        use_safetensors=True,  # never a pickle
        attn_implementation=attention,
        **({"device_map": "auto"} if device == "sharded" else {}),
        **common,
    )


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
