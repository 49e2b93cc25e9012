"""The masks of dropout: one bank of random numbers for a micro-step, of which every layer takes a piece.

A mask depends on (seed, step, micro-step, layer) alone: gradient checkpointing runs a layer twice and must meet the
same mask, a resumed run must as well, and every device sees the same numbers, since they are drawn on the CPU. Layers
take pieces that may overlap, from places that change with every micro-step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_trainer.devices import to_device

_BLOCK = 2**18
"""Numbers that one generator draws. A piece begins within the first block, wherever it ends."""
_ALIGNMENT = 8
"""Numbers between two places where a piece may begin, so that kernels can read several at once."""
_LEVELS = 2**16
"""Of one number; a probability is rounded to so many steps."""


def seed_from(*parts: object) -> int:
    """63 bits that depend on all of ``parts`` and on nothing else (no process, no platform, no global state)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class DropoutMasks:
    """``begin`` names what all masks depend on; ``keep`` gives the mask of one layer."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._banks: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}
        self._blocks = 1  # as many as were needed so far

    def begin(self, seed: int) -> None:
        """From now on the masks are those of this seed."""
        self._seed = seed
        self._banks.clear()

    def keep(
        self, shape: Sequence[int], probability: float, layer: str, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """0 with ``probability``, else 1 / (1 - probability): what a tensor of this shape is multiplied by.

        The same for the same (seed, layer), however often it is asked for.
        """
        if self._seed is None:
            raise RuntimeError("Dropout needs AdapterSet.begin_step before each step.")
        count = math.prod(shape)
        start = seed_from(self._seed, layer) % (_BLOCK // _ALIGNMENT) * _ALIGNMENT
        key = (probability, device, dtype)
        bank = self._banks.get(key)
        if bank is None or len(bank) < start + count:
            self._blocks = max(self._blocks, -(-(start + count) // _BLOCK))
            bank = self._banks[key] = self._factors(probability, device, dtype)
        return bank[start : start + count].view(*shape)

    def _factors(self, probability: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        numbers = torch.cat([self._draw(block) for block in range(self._blocks)])
        dropped = round(probability * _LEVELS)
        kept = to_device(numbers, device) >= dropped - _LEVELS // 2
        return kept.to(dtype).mul_(_LEVELS / (_LEVELS - dropped))

    def _draw(self, block: int) -> Tensor:
        """(_BLOCK) int16, all values alike; four of them are drawn at once."""
        generator = torch.Generator().manual_seed(seed_from(self._seed, "block", block))
        return torch.randint(-(2**63), 2**63 - 1, (_BLOCK // 4,), generator=generator).view(torch.int16)
