"""The masks of dropout: one bank of random numbers for a micro-step, of which every layer takes a piece.

A mask depends on (seed, step, micro-step, layer) alone: gradient checkpointing runs a layer twice and must meet the
same mask, a resumed run must as well, and every device sees the same numbers, since they are drawn on the CPU. A layer
takes its piece from a place of its own, the same in every step, where the numbers are drawn anew; pieces may overlap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_trainer.devices import to_device

_BLOCK = 2**18
"""Numbers that one generator draws. A piece begins within the first block, wherever it ends."""
_ALIGNMENT = 8
"""Numbers between two places where a piece may begin, so that kernels can read several at once."""
_LEVELS = 2**16
"""Of one number; a probability is rounded to so many steps."""

_Kind = tuple[float, torch.device, torch.dtype]  # probability, and where and as what a bank lies


def seed_from(*parts: object) -> int:
    """63 bits that depend on all of ``parts`` and on nothing else (no process, no platform, no global state)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class MicroBatchPart(NamedTuple):
    """The samples ``start`` to ``stop`` of a micro-batch."""

    start: int
    stop: int


class DropoutMasks:
    """``begin`` names what all masks depend on; ``keep`` gives the mask of one layer, a view of numbers that ``begin``
    draws anew in place.

    part: what of the micro-batch is computed; None for the whole.
    """

    def __init__(self) -> None:
        self._seed: int | None = None
        self.part: MicroBatchPart | None = None
        # Of each kind the banks that were made so far, of growing length. All of them are kept and written to: a CUDA
        # graph reads the one that was there when it was recorded.
        self._banks: dict[_Kind, list[Tensor]] = {}
        self._blocks = 1  # as many as were needed so far

    def begin(self, seed: int, part: MicroBatchPart | None = None) -> None:
        """From now on the masks are those of this seed. ``part``: what of the micro-batch is computed, if not all."""
        self._seed, self.part = seed, part
        numbers = self._numbers() if self._banks else None
        for kind, banks in self._banks.items():
            factors = _factors(numbers, kind)
            for bank in banks:
                bank.copy_(factors[: len(bank)])

    def keep(
        self,
        shape: Sequence[int],
        probability: float,
        layer: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        by_sample: bool = False,
    ) -> Tensor:
        """0 with ``probability``, else 1 / (1 - probability): what a tensor of this shape is multiplied by.

        The same for the same (seed, layer), however often it is asked for. by_sample: the first dimension goes over the
        samples, with equally many entries for each; of a part of the micro-batch it is that part of the whole's mask.
        """
        if self._seed is None:
            raise RuntimeError("Dropout needs AdapterSet.begin_step before each step.")
        count, kind = math.prod(shape), (probability, device, dtype)
        start = seed_from("place", layer) % (_BLOCK // _ALIGNMENT) * _ALIGNMENT
        if by_sample and self.part is not None:
            start += count // (self.part.stop - self.part.start) * self.part.start
        banks = self._banks.setdefault(kind, [])
        if not banks or len(banks[-1]) < start + count:
            self._blocks = max(self._blocks, -(-(start + count) // _BLOCK))
            banks.append(_factors(self._numbers(), kind))
        return banks[-1][start : start + count].view(*shape)

    def _numbers(self) -> Tensor:
        """(blocks · _BLOCK) int16 on the CPU, all values alike."""
        return torch.cat([self._draw(block) for block in range(self._blocks)])

    def _draw(self, block: int) -> Tensor:
        """(_BLOCK) int16; four of them are drawn at once."""
        generator = torch.Generator().manual_seed(seed_from(self._seed, "block", block))
        return torch.randint(-(2**63), 2**63 - 1, (_BLOCK // 4,), generator=generator).view(torch.int16)


def _factors(numbers: Tensor, kind: _Kind) -> Tensor:
    """0 where a number falls below the probability, else what keeps the mean."""
    probability, device, dtype = kind
    dropped = round(probability * _LEVELS)
    kept = to_device(numbers, device) >= dropped - _LEVELS // 2
    return kept.to(dtype).mul_(_LEVELS / (_LEVELS - dropped))
