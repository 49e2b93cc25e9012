"""LoRA on Linear, LoCon on convolutions, and DoRA over both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_trainer.adapters.algebra import dora_gain, low_rank_delta
from lora_trainer.adapters.base import Adapter, kaiming_uniform
from lora_trainer.adapters.fused import LoraLinear
from lora_trainer.devices import autocast_dtype


class LoraAdapter(Adapter):
    """``y = W x + b + alpha/rank · up(down(x))`` (arXiv:2106.09685); a new one changes nothing, since up is zero.

    On a convolution, down has its kernel, stride and padding, and up is 1 × 1 (LoCon).

    dropout acts on the rank's activations, element by element; rank_dropout switches whole ranks off for a picture
    and scales the others up, as kohya's trainer does both.

    With DoRA the columns of the changed weight get trained lengths. A factor on a column is a factor on the input, so
    ``(W + ΔW)·diag(g) x`` is computed as ``(W + ΔW)(g ⊙ x)``: the changed weight itself is only needed for the
    lengths, through which no gradient goes (section 4.3 of the paper).
    """

    kind = "lora"

    def __init__(self, layer: nn.Module, rank: int, alpha: float, **options: Any):
        super().__init__(layer, rank, alpha, **options)
        out_width, in_width, *kernel = self.shape
        self.lora_down = self.parameter(kaiming_uniform((rank, in_width, *kernel), self.generator))
        self.lora_up = self.parameter(torch.zeros(out_width, rank, *[1] * len(kernel)))
        self.is_conv = bool(kernel)
        # The forward of torch's own classes can be taken apart, and that of a layer which only casts its weight (it
        # says so by its compute_dtype); any other, a host's perhaps, is called as it is.
        plain = nn.Conv2d if self.is_conv else nn.Linear
        self.base_is_plain = "forward" not in vars(layer) and (
            type(layer).forward is plain.forward or hasattr(layer, "compute_dtype")
        )

    @staticmethod
    def count(shape: Sequence[int], rank: int, **options: Any) -> int:
        return rank * (shape[0] + math.prod(shape[1:]))

    def delta_weight(self) -> Tensor:
        return self.scale * low_rank_delta(self.lora_down, self.lora_up)

    def factors(self) -> dict[str, Tensor]:
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up}

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        if self.dora_scale is None:
            return self._low_rank(x)
        gain = self._gain().to(x.dtype)
        adapted = self._low_rank(x * gain)
        return adapted if self.multiplier == 1 else torch.lerp(self.base(x), adapted, self.multiplier)

    def _gain(self) -> Tensor:
        """DoRA's factor for each input: (in) for a Linear, (1, in, 1, 1) for a convolution."""
        with torch.no_grad():
            inverse_norm = dora_gain(self.base_weight(), self.delta_weight(), torch.ones_like(self.dora_scale))
        gain = self.dora_scale * inverse_norm
        return gain if self.is_conv else gain.flatten()

    def _low_rank(self, x: Tensor) -> Tensor:
        """The layer plus its LoRA; DoRA's multiplier is not applied here."""
        scale = self.scale if self.dora_scale is not None else self.scale * self.multiplier
        dropping = self.training and (self.dropout or self.rank_dropout)
        autocast = autocast_dtype(x.device)
        dtype = autocast or getattr(self.layer, "compute_dtype", x.dtype)
        if self.base_is_plain and not self.is_conv and not dropping:
            layer = self.layer
            return LoraLinear.apply(x, layer.weight, layer.bias, self.lora_down, self.lora_up, scale, dtype)
        output = self.base(x)
        down, up = self.lora_down, self.lora_up if scale == 1 else self.lora_up * scale
        if autocast is None:  # else it casts what follows by itself
            x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        hidden = self._down(x, down)
        if dropping:
            hidden = self._drop(hidden)
        change = functional.conv2d(hidden, up) if self.is_conv else functional.linear(hidden, up)
        # Neither a Linear nor a convolution keeps its output for the backward pass. One that casts its weight is a
        # node of its own, and autograd does not let us write to a view that such a node returned.
        casts = getattr(self.layer, "compute_dtype", self.layer.weight.dtype) != self.layer.weight.dtype
        if self.base_is_plain and output.dtype == change.dtype and not casts:
            return output.add_(change)
        return output + change

    def _down(self, x: Tensor, down: Tensor) -> Tensor:
        if not self.is_conv:
            return functional.linear(x, down)
        return functional.conv2d(x, down, None, self.layer.stride, self.layer.padding, self.layer.dilation)

    def _drop(self, hidden: Tensor) -> Tensor:
        """dropout and rank_dropout on the rank's activations: (B, …, r) or (B, r, h, w)."""
        if self.dropout:
            keep = self.keep_mask(hidden.shape, self.dropout, "elements", hidden.device)
            hidden = hidden * (keep / (1 - self.dropout)).to(hidden.dtype)
        if self.rank_dropout:
            ranks = (len(hidden), self.rank) if hidden.dim() > 1 else (1, self.rank)
            keep = self.keep_mask(ranks, self.rank_dropout, "ranks", hidden.device) / (1 - self.rank_dropout)
            between = hidden.dim() - 2
            shape = (*ranks, *[1] * between) if self.is_conv else (ranks[0], *[1] * between, self.rank)
            hidden = hidden * keep.view(shape).to(hidden.dtype)
        return hidden
