"""LoHa: the product, element by element, of two low-rank matrices (LyCORIS's "loha")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.adapters.algebra import hadamard_delta
from lora_trainer.adapters.base import WeightAdapter


class LohaAdapter(WeightAdapter):
    """``ΔW = alpha/rank · (w1_a w1_b) ⊙ (w2_a w2_b)``: rank up to r² from the parameters of two LoRAs.

    Starts as LyCORIS does: w2_a zero, w1_a normal with 0.1, the others normal with 1.
    """

    kind = "loha"

    def __init__(self, layer: nn.Module, rank: int, alpha: float, **options: Any):
        super().__init__(layer, rank, alpha, **options)
        out_width, fan_in = self.shape[0], math.prod(self.shape[1:])

        def normal(rows: int, columns: int, deviation: float) -> nn.Parameter:
            return self.parameter(torch.randn(rows, columns, generator=self.generator) * deviation)

        self.hada_w1_a = normal(out_width, rank, 0.1)
        self.hada_w1_b = normal(rank, fan_in, 1.0)
        self.hada_w2_a = self.parameter(torch.zeros(out_width, rank))
        self.hada_w2_b = normal(rank, fan_in, 1.0)

    @staticmethod
    def count(shape: Sequence[int], rank: int, **options: Any) -> int:
        return 2 * rank * (shape[0] + math.prod(shape[1:]))

    def delta_weight(self) -> Tensor:
        # The scale is folded into a factor, which is small, instead of the product, which is not.
        return hadamard_delta(
            (self.hada_w1_a * self.scale) @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b, self.shape
        )

    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
