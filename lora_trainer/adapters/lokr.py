"""LoKr: the Kronecker product of a small matrix and a larger one, which may be low-rank (LyCORIS's "lokr")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.adapters.algebra import factorize, kronecker_delta
from lora_trainer.adapters.base import WeightAdapter, kaiming_uniform


class LokrAdapter(WeightAdapter):
    """``ΔW = scale · w1 ⊗ w2`` with w1 (a, c), w2 (b, d[, kh, kw]), a·b = out, c·d = in.

    w2 is ``w2_a w2_b`` of the given rank unless the rank is so high (half the larger of b and d) that the whole
    matrix is no larger. Then nothing has a rank, and by LyCORIS's rule, which the readers share, the scale is 1.
    """

    kind = "lokr"

    def __init__(self, layer: nn.Module, rank: int, alpha: float, *, factor: int = -1, **options: Any):
        super().__init__(layer, rank, alpha, **options)
        (out_small, out_large), (in_small, in_large), self.is_full = _split(self.shape, rank, factor)
        kernel = self.shape[2:]
        if self.is_full:
            self.alpha = float(rank)
        self.lokr_w1 = self.parameter(kaiming_uniform((out_small, in_small), self.generator))
        if self.is_full:
            self.lokr_w2 = self.parameter(torch.zeros(out_large, in_large, *kernel))
        else:
            self.lokr_w2_a = self.parameter(kaiming_uniform((out_large, rank), self.generator))
            self.lokr_w2_b = self.parameter(torch.zeros(rank, in_large * math.prod(kernel)))

    @staticmethod
    def count(shape: Sequence[int], rank: int, *, factor: int = -1, **options: Any) -> int:
        (out_small, out_large), (in_small, in_large), is_full = _split(shape, rank, factor)
        fan_in = in_large * math.prod(shape[2:])
        return out_small * in_small + (out_large * fan_in if is_full else rank * (out_large + fan_in))

    def delta_weight(self) -> Tensor:
        w2 = self.lokr_w2 if self.is_full else self.lokr_w2_a @ self.lokr_w2_b
        return kronecker_delta(self.lokr_w1 * self.scale, w2, self.shape)

    def factors(self) -> dict[str, Tensor]:
        names = ("lokr_w1", "lokr_w2") if self.is_full else ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
        return {name: getattr(self, name) for name in names}


def _split(shape: Sequence[int], rank: int, factor: int) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """(a, b), (c, d), and whether w2 is a full matrix."""
    out, into = factorize(shape[0], factor), factorize(shape[1], factor)
    return out, into, 2 * rank >= max(out[1], into[1])
