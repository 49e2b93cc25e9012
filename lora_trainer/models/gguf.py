"""GGUF files: their table of contents, and their weights as they are stored (``gguf_blocks`` decodes those).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.models.gguf_blocks import FORMATS, GgufPacking, stored_bytes
from lora_trainer.models.header import DOWNLOAD_AGAIN
from lora_trainer.storage import pack

MAGIC = b"GGUF"
PREFIX = "GGUF "
"""What the names of number formats begin with here: "GGUF Q4_K"."""
USE_READABLE = "Use the bf16, fp16, fp8 or a GGUF (Q8_0, Q6_K, Q5_…, Q4_…) version of this model."

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16",
}  # fmt: skip
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNMENT = "general.alignment"
_MAX_TEXT, _MAX_ITEMS = 1 << 24, 1 << 22


def can_be_read(dtype: str) -> bool:
    """Whether weights in this number format, by its name here, can be computed with."""
    return dtype.removeprefix(PREFIX) in (*_PLAIN, *FORMATS)


def stored_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight in this number format, by its name here. Raises ValueError where its rows are no whole blocks.
    """
    kind = dtype.removeprefix(PREFIX)
    plain = _PLAIN.get(kind)
    return stored_bytes(kind, shape) if plain is None else math.prod(shape) * plain.itemsize


class GgufSource:
    """A GGUF file, as a ``Source``. Quantized weights are handed out as their bytes, for ``storage.dense_weight``."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        try:
            with open(self.path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise UserError(f"{self.path.name} cannot be read: {error.strerror or error}.") from error
        except (struct.error, KeyError, ValueError) as error:
            raise UserError(f"{self.path.name} is a GGUF file that is damaged.", remedy=DOWNLOAD_AGAIN) from error

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """The weight, mapped from the file on the CPU; dtype: for those that are stored as plain numbers."""
        shape, kind = self.shapes[name], self.dtypes[name].removeprefix(PREFIX)
        try:
            plain = _PLAIN.get(kind)
            size = stored_size(kind, shape)
            data = np.memmap(self.path, mode="c", offset=self._offsets[name], shape=(size,))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.path.name}: {name} cannot be read as {kind} ({error}).", remedy=DOWNLOAD_AGAIN
            ) from error
        stored = torch.from_numpy(data)
        if plain is not None:
            return stored.view(plain).reshape(shape).to(device, dtype or plain)
        return pack(stored.to(device), GgufPacking(kind, shape))

    def _read(self, file: BinaryIO) -> None:
        if file.read(4) != MAGIC or _number(file, "I") not in (2, 3):
            raise ValueError("another version")
        tensors, entries = _count(file), _count(file)
        alignment = 32
        for _ in range(entries):
            name = _text(file)
            value = _value(file, _number(file, "I"))
            if name == _ALIGNMENT and isinstance(value, int) and value > 0:
                alignment = value
            if isinstance(value, str):
                self.metadata[name] = value
        for _ in range(tensors):
            name = _text(file)
            sizes = [_number(file, "Q") for _ in range(min(_number(file, "I"), 8))]
            kind = _number(file, "I")
            self._offsets[name] = _number(file, "Q")
            self.shapes[name] = tuple(reversed(sizes))
            self.dtypes[name] = PREFIX + _TYPES.get(kind, f"type {kind}")
        start = -(-file.tell() // alignment) * alignment
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _number(file, _NUMBERS[kind])
    inner, count = _number(file, "I"), _count(file)
    if inner in _NUMBERS:
        file.seek(count * struct.calcsize(_NUMBERS[inner]), 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _count(file: BinaryIO) -> int:
    count = _number(file, "Q")
    if count > _MAX_ITEMS:
        raise ValueError("too many")
    return count


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _MAX_TEXT:
        raise ValueError("too long")
    return file.read(length).decode("utf-8", "replace")
