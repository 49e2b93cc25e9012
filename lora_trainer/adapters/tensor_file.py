"""safetensors files: read with every fault turned into a message, written so that equal content is equal bytes.

Writing is our own (the format is a length, a JSON header and the data): the library takes all tensors in memory at
once, where a merged checkpoint is better streamed, and leaves the order of the metadata to chance.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_trainer.errors import UserError

# In the order in which the library sorts them; data lies in the file from the last of these to the first.
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {name: position for position, name in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor. dtype is the format's name for it, such as F16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU. Raises UserError when ``path`` is missing, no safetensors file, or damaged."""
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path.name} is not a readable .safetensors file ({error}).", remedy="It may be cut off: copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}.") from error


def specs_of(handle: Any, path: Path) -> list[TensorSpec]:
    """What an opened file holds. Raises UserError for number formats that torch does not know."""
    specs = []
    for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
        part = handle.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise UserError(f"{path.name}: {name} is stored as {part.get_dtype()}, which is not supported.")
        specs.append(TensorSpec(name, part.get_dtype(), tuple(part.get_shape())))
    return specs


def write_tensors(
    handle: BinaryIO,
    specs: Iterable[TensorSpec],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a safetensors file; ``load(name)`` is asked for one tensor at a time."""
    ordered, header = _layout(specs, metadata)
    handle.write(header)
    for spec in ordered:
        tensor = load(spec.name)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise ValueError(f"{spec.name} is not what was announced.")
        handle.write(_bytes(tensor))


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """``tensors`` as the bytes of a safetensors file: the library's bytes, up to the order within the header."""
    ordered, header = _layout(
        (TensorSpec(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()), metadata
    )
    return b"".join([header, *(_bytes(tensors[spec.name]) for spec in ordered)])


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash``, by which WebUIs know a LoRA whatever is later written into it.

    Of the file as it would be with its ``ss_*`` metadata only: SHA-256 of everything behind the header, and the
    first 8 digits of the SHA-256 of 64 KiB from the first MiB on (kohya's and additional-networks' definition).
    """
    data = serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def _layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None) -> tuple[list[TensorSpec], bytes]:
    ordered = sorted(specs, key=lambda spec: (-_RANK[spec.dtype], spec.name))
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for spec in ordered:
        size = torch.Size(spec.shape).numel() * spec.torch_dtype.itemsize
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ordered, struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
