"""The table of contents of a GGUF file: enough to say what model it holds. Its weights are not read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.models.header import DOWNLOAD_AGAIN

MAGIC = b"GGUF"
PREFIX = "GGUF "
"""What the names of number formats begin with here: "GGUF Q4_K"."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16",
}  # fmt: skip
_MAX_TEXT, _MAX_ITEMS = 1 << 24, 1 << 22


class GgufSource:
    """The names, shapes and number formats of a GGUF file, as a ``Source``."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        try:
            with open(self.path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise UserError(f"{self.path.name} cannot be read: {error.strerror or error}.") from error
        except (struct.error, KeyError, ValueError) as error:
            raise UserError(f"{self.path.name} is a GGUF file that is damaged.", remedy=DOWNLOAD_AGAIN) from error

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        raise UserError(f"{self.path.name} is a GGUF file, whose weights are not read.", field="base_model")

    def _read(self, file: BinaryIO) -> None:
        if file.read(4) != MAGIC or _number(file, "I") not in (2, 3):
            raise ValueError("another version")
        tensors, entries = _count(file), _count(file)
        for _ in range(entries):
            name = _text(file)
            value = _value(file, _number(file, "I"))
            if isinstance(value, str):
                self.metadata[name] = value
        for _ in range(tensors):
            name = _text(file)
            sizes = [_number(file, "Q") for _ in range(min(_number(file, "I"), 8))]
            kind = _number(file, "I")
            _number(file, "Q")  # where its data lie
            self.shapes[name] = tuple(reversed(sizes))
            self.dtypes[name] = PREFIX + _TYPES.get(kind, f"type {kind}")


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
