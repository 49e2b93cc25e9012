"""The table of contents of a .safetensors file, read and checked without touching the weights.

Format: 8 bytes N (little-endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_trainer.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DOWNLOAD_AGAIN = "Download or copy the file again, and compare its size with the original."

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Sizes in bytes of types that a base model's weights cannot have; they are known so that the file can be named.
_OTHER_SIZES = {
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_SIZES

# What files of other kinds begin with; {0} is the file.
_MAGIC = (
    (b"GGUF", "{0} is a GGUF file (quantized weights).", "Choose a .safetensors file."),
    (b"PK\x03\x04", "{0} is a PyTorch .ckpt with a changed file ending.", "Rename it to .ckpt."),
    (b"\x80\x02", "{0} is an old PyTorch .ckpt with a changed file ending.", "Rename it to .ckpt."),
    (b"version https://git-lfs", "{0} is a Git LFS pointer, not the file itself.", "Fetch it with: git lfs pull"),
    (b"<", "{0} is a web page, not a model.", "The download was probably refused; download the file again."),
    (b"\x89PNG", "{0} is a picture.", "Choose a base model."),
    (b"\xff\xd8\xff", "{0} is a picture.", "Choose a base model."),
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. ``dtype`` is the format's own name; ``start`` and ``stop`` count from the file's start."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for name, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``.

    Raises:
        UserError: the file cannot be read, is empty or truncated, or is not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            prefix = handle.read(32)
            if not size:
                raise UserError(f"{path.name} is empty (0 bytes).", remedy=DOWNLOAD_AGAIN)
            for magic, what, remedy in _MAGIC:
                if prefix.startswith(magic):
                    raise UserError(what.format(path.name), remedy=remedy)
            length = struct.unpack("<Q", prefix[:8])[0] if size >= 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise _not_safetensors(path, "its first bytes give no sensible header length")
            if size < 8 + length:
                raise UserError(f"{path.name} is truncated: it ends inside its header.", remedy=DOWNLOAD_AGAIN)
            handle.seek(8)
            raw = handle.read(length)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    try:
        table = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(path, "its header is not JSON") from error
    if not isinstance(table, dict):
        raise _not_safetensors(path, "its header is not a table")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _not_safetensors(path, "its metadata is not a table")
    start = 8 + length
    entries = {name: _entry(path, name, value, start, size) for name, value in table.items()}
    if not entries:
        raise UserError(f"{path.name} holds no tensors.", remedy="Choose a base model.")
    _check_layout(path, entries, start)
    return Header(entries, {str(key): str(value) for key, value in metadata.items()})


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        integers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise _not_safetensors(path, f"its entry for {name[:80]!r} is malformed") from error
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in integers) or not isinstance(dtype, str):
        raise _not_safetensors(path, f"its entry for {name[:80]!r} is malformed")
    if dtype not in SIZES:
        raise UserError(f"{path.name}: tensor {name[:80]!r} has the unknown number format {dtype[:20]!r}.")
    if end - begin != math.prod(shape) * SIZES[dtype]:
        raise _not_safetensors(path, f"the size of {name[:80]!r} does not fit its shape")
    if start + end > size:
        raise UserError(
            f"{path.name} is truncated: it has {size:,} bytes, and {name[:80]!r} ends at {start + end:,}.",
            remedy=DOWNLOAD_AGAIN,
        )
    return Entry(tuple(shape), dtype, start + begin, start + end)


def _check_layout(path: Path, entries: dict[str, Entry], start: int) -> None:
    """Tensors follow each other without overlap or gap, as the format demands."""
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            raise _not_safetensors(path, "its tensors overlap or leave gaps")
        position = entry.stop


def _not_safetensors(path: Path, why: str) -> UserError:
    return UserError(f"{path.name} is not a sound safetensors file: {why}.", remedy=DOWNLOAD_AGAIN)
