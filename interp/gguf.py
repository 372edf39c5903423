"""What a GGUF file says of itself, read before a library opens it: whole, and of types that can be undone."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pingscope.interp.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the file names no other
# Tokenizers that split every digit off (llama.cpp's table of `tokenizer.ggml.pre`). transformers builds them without
# that step, which is another tokenization of every blank before a number.
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


@dataclass(frozen=True)
class Stored:
    """One tensor: how many numbers, of which type (ggml's id), and where its bytes begin in the data."""

    name: str
    numbers: int
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """``settings``: every field by its name; of an array its length. ``data``: where the tensors' bytes begin."""

    settings: dict[str, Any]
    tensors: tuple[Stored, ...]
    data: int

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        return sum(tensor.numbers for tensor in self.tensors)


def read_header(file: Path) -> Header:
    """Fields and table of tensors of a file; no tensor is read.

    Raises:
        UserError: no GGUF, another version of the format, or one that ends inside its header.
    """
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            if raw[:4] != b"GGUF":
                raise UserError(f"{file}: cannot load the file (it is no GGUF); copy or download it again")
            return _Cursor(raw).header(file)
    except (OSError, struct.error, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: cannot load the file (damaged GGUF header); copy or download it again") from error


def check_gguf(file: Path) -> Header:
    """The header of a file that is whole and whose every tensor can be turned back into numbers.

    Raises:
        UserError: a quantised type that the package gguf cannot undo, a file that is cut off.
    """
    import gguf

    header, size = read_header(file), file.stat().st_size
    for tensor in header.tensors:
        kind = _undone(tensor.kind)
        if kind is None:
            known = {one.value: one.name for one in gguf.GGMLQuantizationType}
            raise UserError(
                f"{file}: tensor {tensor.name} is stored as {known.get(tensor.kind, f'type {tensor.kind}')}, which the "
                "package gguf cannot undo; take another quantisation (Q8_0, Q4_K_M, F16) or the safetensors folder"
            )
        block, width = gguf.GGML_QUANT_SIZES[kind]
        if header.data + tensor.offset + tensor.numbers // block * width > size:
            raise UserError(f"{file}: is cut off ({size} bytes, {tensor.name} lies beyond); copy or download it again")
    return header


def mend_tokenizer(tokenizer: Any, header: Header) -> None:
    """Put back the step that splits digits off where the file asks for it and transformers left it out."""
    from tokenizers import pre_tokenizers

    if header.settings.get("tokenizer.ggml.pre") in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def as_plain(hf: Any) -> None:
    """Forget that the numbers were blocks once: to transformers a model from a GGUF file stays a quantised one, which
    is neither moved to another device nor saved. One whose blocks are still packed stays what it is.
    """
    import torch

    if any(tensor.dtype == torch.uint8 for tensor in (*hf.parameters(), *hf.buffers())):
        return
    hf.hf_quantizer, hf.is_quantized = None, False
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config


def _undone(kind: int) -> Any:
    """The type of this id if blocks of it can be dequantised: tried on one block of zeros. Otherwise None."""
    import gguf
    import numpy as np

    try:
        found = gguf.GGMLQuantizationType(kind)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[found][1]), np.uint8), found)
    except (ValueError, NotImplementedError):
        return None
    return found


class _Cursor:
    """Reads one value after another; the format is a plain sequence, little-endian."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.at = raw, 4

    def header(self, file: Path) -> Header:
        version, tensors, fields = self.take("IQQ")
        if version not in _VERSIONS:
            raise UserError(f"{file}: is GGUF version {version}; convert it to version 3, or give the model's folder")
        settings = dict(self.field() for _ in range(fields))
        table = tuple(self.tensors(tensors))
        step = int(settings.get("general.alignment", _ALIGNMENT))
        return Header(settings, table, -(-self.at // step) * step)

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.raw, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.raw) - self.at:
            raise ValueError("a text that is longer than the file")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def field(self) -> tuple[str, Any]:
        name, (kind,) = self.text(), self.take("I")
        return name, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        inner, count = self.take("IQ")
        if inner in _SCALARS:
            self.at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        else:
            for _ in range(count):
                self.value(inner)
        return count

    def tensors(self, count: int) -> Iterator[Stored]:
        for _ in range(count):
            name, (dimensions,) = self.text(), self.take("I")
            shape = self.take(f"{dimensions}Q")
            kind, offset = self.take("IQ")
            yield Stored(name, prod(shape), kind, offset)
