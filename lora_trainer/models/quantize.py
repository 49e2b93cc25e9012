"""Frozen weights in fewer bits, made as a file is read: fp8 with a scale for each row, or nf4 in blocks of 64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_trainer.storage import Scaled, dense_weight, pack, packing_of

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The numbers that nf4's 16 codes stand for (QLoRA, https://arxiv.org/abs/2305.14314; bitsandbytes)."""
BLOCK = 64
"""So many weights share the largest absolute value by which their codes are multiplied."""
BYTES = {"fp8": 1.0, "nf4": 0.5 + 4 / BLOCK}
"""Of a weight; fp8's scales, 4 bytes for a row, are left out."""
_LARGEST_FP8 = 448.0
_AT_ONCE = 1 << 16  # blocks; so that what is larger than the weight itself never is so for all of it


@dataclass(frozen=True)
class Nf4:
    """See ``storage.Packing``: bytes of two codes each, the first in the upper half, as bitsandbytes stores them.

    absmax: (blocks,) fp32. pairs: (256, 2), what the two codes of each byte stand for; on the device of ``absmax``.
    """

    absmax: Tensor
    pairs: Tensor
    shape: tuple[int, ...]

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        return self.shape

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        weight = torch.empty(len(self.absmax), BLOCK, dtype=dtype, device=stored.device)
        codes = stored.view(len(self.absmax), BLOCK // 2)
        for start in range(0, len(codes), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            numbers = self.pairs.index_select(0, codes[part].flatten().int()).view(-1, BLOCK)
            weight[part] = numbers.mul_(self.absmax[part, None])
        return weight.view(-1)[: torch.Size(self.shape).numel()].view(self.shape)

    def to(self, device: torch.device) -> Nf4:
        return replace(self, absmax=self.absmax.to(device), pairs=self.pairs.to(device))


def nf4(weight: Tensor) -> Tensor:
    """A weight of any shape, in nf4; what it lacks to whole blocks is filled up with 0."""
    flat = weight.detach().flatten()
    if missing := -len(flat) % BLOCK:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    blocks = flat.view(-1, BLOCK)
    values = torch.tensor(NF4, device=flat.device)
    middles = (values[1:] + values[:-1]) / 2
    absmax = torch.empty(len(blocks), device=flat.device)
    stored = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=flat.device)
    for start in range(0, len(blocks), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        exact = blocks[part].float()
        largest = exact.abs().amax(1)
        absmax[part] = largest
        codes = torch.bucketize(exact / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None], middles)
        stored[part] = (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)
    upper, lower = values.repeat_interleave(16), values.repeat(16)
    return pack(stored.flatten(), Nf4(absmax, torch.stack([upper, lower], dim=1), tuple(weight.shape)))


def fp8(weight: Tensor) -> Tensor:
    """A weight (out, in) in e4m3. Its rows' scales are powers of two: multiplying by them rounds nothing."""
    exact = weight.detach().float()
    _, exponent = torch.frexp(exact.abs().amax(1, keepdim=True) / _LARGEST_FP8)
    scale = torch.ldexp(torch.ones_like(exact[:, :1]), exponent)
    return pack((exact / scale).to(torch.float8_e4m3fn), Scaled(scale))


_MADE = {"fp8": fp8, "nf4": nf4}


def quantize(weight: Tensor, form: str) -> Tensor:
    """A weight (out, in) in this form, "fp8" or "nf4". What takes no more bytes already is returned as it is."""
    packing = packing_of(weight)
    if weight.element_size() <= BYTES[form] or not (packing is None or isinstance(packing, Scaled)):
        return weight
    plain = packing is None and weight.element_size() > 1  # torch 2.1 joins no fp8
    return _MADE[form](weight if plain else dense_weight(weight, torch.float32))
