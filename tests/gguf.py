"""GGUF files of tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch

F32, Q8_0 = 0, 8
"""Numbers of ggml's types."""


def write(path: Path, tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], alignment: int = 32) -> Path:
    """tensors: name -> (number of ggml's type, shape, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + text("general.architecture") + struct.pack("<I", 8)
    content += text("flux")
    data = b""
    for name, (kind, shape, stored) in tensors.items():
        data += bytes(-len(data) % alignment)
        content += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        content += struct.pack("<IQ", kind, len(data))
        data += stored
    path.write_bytes(content + bytes(-len(content) % alignment) + data)
    return path


def quantized(weight: torch.Tensor) -> bytes:
    """Q8_0 of a matrix."""
    blocks = weight.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().to(torch.int8)
    return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1).numpy().tobytes()
