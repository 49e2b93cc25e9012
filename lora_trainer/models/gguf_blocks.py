"""Weights of GGUF files: their blocks of numbers, decoded when a layer computes.

The layouts of the blocks are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); a block
holds so many numbers in so many bytes, in the order of the struct's fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 22
"""Numbers that are decoded at once in fp32, 16 MiB; the rest of the weight is in the format of the computation."""


@dataclass(frozen=True)
class BlockFormat:
    """numbers, bytes: of a block. decode: (n, bytes) uint8 -> (n, numbers) fp32."""

    numbers: int
    bytes: int
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GgufPacking:
    """See ``storage.Packing``: a tensor of bytes, the blocks of a weight of this shape, one after the other."""

    kind: str
    shape: tuple[int, ...]

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        return self.shape

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        form = FORMATS[self.kind]
        blocks = stored.view(-1, form.bytes)
        dense = torch.empty(len(blocks), form.numbers, dtype=dtype, device=stored.device)
        step = max(1, ROWS_AT_ONCE // form.numbers)
        for start in range(0, len(blocks), step):
            dense[start : start + step] = form.decode(blocks[start : start + step])
        return dense.view(self.shape)

    def to(self, device: torch.device) -> GgufPacking:
        return self


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """How many bytes a weight takes. Raises ValueError when its rows are no whole blocks."""
    form, numbers = FORMATS[kind], math.prod(shape)
    if numbers % form.numbers or shape[-1] % form.numbers:
        raise ValueError(f"rows of {shape[-1]} numbers in blocks of {form.numbers}")
    return numbers // form.numbers * form.bytes


def _half(blocks: Tensor, at: int) -> Tensor:
    """An fp16 number of every block, (n, 1) fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 2k) numbers from 0 to 15: all low halves, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(n, 4) bytes -> (n, 32), bit by bit, from the lowest."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[:, :, None] >> bits & 1).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a K block's 12 bytes, (n, 8) each."""
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([low & 63, (rest & 15) | (low >> 6) << 4], dim=1)
    minima = torch.cat([high & 63, (rest >> 4) | (high >> 6) << 4], dim=1)
    return scales, minima


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    quants = blocks[:, 16:].reshape(-1, 4, 32)
    quants = torch.stack([quants & 15, quants >> 4], dim=2).reshape(-1, 8, 32).float()
    scale, minimum = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return (scale[:, :, None] * quants - minimum[:, :, None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    bits = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    high = blocks[:, None, 16:48] >> bits[:, None] & 1  # (n, 8, 32)
    quants = blocks[:, 48:].reshape(-1, 4, 32)
    quants = torch.stack([quants & 15, quants >> 4], dim=2).reshape(-1, 8, 32) | high << 4
    scale, minimum = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return (scale[:, :, None] * quants.float() - minimum[:, :, None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=blocks.device, dtype=torch.uint8)
    quants = (low | (high >> shifts[:, None] & 3) << 4).float() - 32  # (n, 2, 4, 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (quants.reshape(-1, 16, 16) * scales[:, :, None]).flatten(1)


FORMATS = {
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
