"""LoRA on Linear, LoCon on convolutions, and DoRA over both."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_trainer.adapters.algebra import changed_norm_squared, column_norm, low_rank_delta, low_rank_squared_norm
from lora_trainer.adapters.base import Adapter, kaiming_uniform
from lora_trainer.adapters.fused import LoraConv2d, LoraLinear
from lora_trainer.devices import without_autocast
from lora_trainer.storage import dense_weight, mark_of


class LoraAdapter(Adapter):
    """``y = W x + b + alpha/rank · up(down(x))`` (arXiv:2106.09685); a new one changes nothing, since up is zero.

    On a convolution, down has its kernel, stride and padding, and up is 1 × 1 (LoCon).

    dropout acts on the rank's activations, element by element; rank_dropout switches whole ranks off for a picture
    and scales the others up, as kohya's trainer does both.

    With DoRA the columns of the changed weight get trained lengths. A factor on a column is a factor on the input, so
    ``(W + ΔW)·diag(g) x`` is computed as ``(W + ΔW)(g ⊙ x)``. The lengths, through which no gradient goes (section
    4.3 of the paper), do not need the changed weight either (``algebra.changed_norm_squared``).

    working: copies of down and up in the format of the computation, and DoRA's factor for each input (1, in[, 1, 1]),
        while a training step computes with some; see ``WorkingCopies``.
    """

    kind = "lora"

    def __init__(self, layer: nn.Module, rank: int, alpha: float, **options: Any):
        super().__init__(layer, rank, alpha, **options)
        out_width, in_width, *kernel = self.shape
        self.lora_down = self.parameter(kaiming_uniform((rank, in_width, *kernel), self.generator))
        self.lora_up = self.parameter(torch.zeros(out_width, rank, *[1] * len(kernel)))
        self.is_conv = bool(kernel)
        self.is_pointwise = self.is_conv and self.lora_down[0, 0].numel() == 1 and self._options[:2] == ((1, 1), (0, 0))
        self.working: tuple[Tensor, ...] = ()
        self._base_norm: tuple[weakref.ref, Tensor, Tensor] | None = None
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

    def delta_norm(self) -> Tensor:
        return self.scale * low_rank_squared_norm(self.lora_down, self.lora_up).sqrt()

    def factors(self) -> dict[str, Tensor]:
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up}

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        if self.dora_scale is None:
            return self._adapted(x, None, self.scale * self.multiplier)
        adapted = self._adapted(x, self._gain(x), self.scale)
        return adapted if self.multiplier == 1 else torch.lerp(self.base(x), adapted, self.multiplier)

    def _adapted(self, x: Tensor, gain: Tensor | None, scale: float) -> Tensor:
        """The layer plus its LoRA; ``gain``: DoRA's factor for each input."""
        layer, dtype = self.layer, self.compute_dtype(x)
        down, up = self.factors_now()
        keep = self._keep(x, dtype) if self.drops else None
        if not self.base_is_plain:
            return self._around_base(x, down, up, gain, keep, scale, dtype)
        if self.is_pointwise:
            return self._by_tokens(x, down, up, gain, keep, scale, dtype)
        tensors = (x, layer.weight, layer.bias, down, up, gain, keep)
        if self.is_conv:
            return LoraConv2d.apply(*tensors, scale, dtype, self._options)
        return LoraLinear.apply(*tensors, scale, dtype)

    def _by_tokens(self, x: Tensor, down: Tensor, up: Tensor, gain, keep, scale: float, dtype: torch.dtype) -> Tensor:
        """A 1 × 1 convolution is a Linear layer on (B, h·w, in). (B, in, h, w) -> (B, out, h, w), channels last."""
        gain = None if gain is None else gain.flatten()
        keep = None if keep is None else keep.flatten(2).transpose(1, 2)
        tensors = (x.flatten(2).transpose(1, 2), self.layer.weight, self.layer.bias, down.flatten(1), up.flatten(1))
        return LoraLinear.apply(*tensors, gain, keep, scale, dtype).transpose(1, 2).unflatten(2, x.shape[2:])

    def _around_base(self, x: Tensor, down: Tensor, up: Tensor, gain, keep, scale: float, dtype: torch.dtype) -> Tensor:
        """The same of ordinary operations, for a base that can only be called."""
        x = x if gain is None else x * gain.to(x.dtype)
        output, x, down, up = self.base(x), x.to(dtype), down.to(dtype), (up * scale).to(dtype)
        if self.is_conv:
            hidden = functional.conv2d(x, down, None, *self._options)
            return output + functional.conv2d(hidden if keep is None else hidden * keep, up)
        hidden = functional.linear(x, down)
        return output + functional.linear(hidden if keep is None else hidden * keep, up)

    @property
    def _options(self) -> tuple:
        return self.layer.stride, self.layer.padding, self.layer.dilation

    def factors_now(self) -> tuple[Tensor, Tensor]:
        """down and up to compute with: the parameters, or their copies while a step computes with those."""
        return (self.working[0], self.working[1]) if self.working else (self.lora_down, self.lora_up)

    @property
    def masters(self) -> list[tuple[tuple[int, ...], list[nn.Parameter]]]:
        """What down and up in ``working`` are copies of, each with its shape."""
        return [(tuple(factor.shape), [factor]) for factor in (self.lora_down, self.lora_up)]

    # -- DoRA --------------------------------------------------------------------------------------------------

    def _gain(self, x: Tensor) -> Tensor:
        """DoRA's factor for each input: (in) for a Linear, (1, in, 1, 1) for a convolution."""
        if len(self.working) > 2:
            return self.working[2] if self.is_conv else self.working[2].flatten()
        with torch.no_grad(), without_autocast(x.device):
            dtype = self.compute_dtype(x)
            weight = dense_weight(self.layer.weight, dtype, self.shape, x.device)
            low_up = self.factors_now()[1].to(dtype)
            base, least = self.base_norm_squared()
            squared = changed_norm_squared(base, weight, self.lora_down, self.lora_up, low_up, self.scale)
            inverse = torch.maximum(squared, least).rsqrt_()
        gain = self.dora_scale * inverse
        return gain if self.is_conv else gain.flatten()

    def base_norm_squared(self) -> tuple[Tensor, Tensor]:
        """‖W‖² per column of the weight that the layer has now, which its lender may have bound anew; and the least
        that ‖W + ΔW‖² is taken for: a thousandth of W's length, or what keeps a column of zeros from becoming NaN."""
        mark = mark_of(self.layer.weight)
        if self._base_norm is None or self._base_norm[0]() is not mark:
            squared = column_norm(self.base_weight()).square()
            least = (1e-6 * squared).clamp_min(torch.finfo(squared.dtype).tiny)
            if self._base_norm is not None:  # a CUDA graph may read those
                squared, least = self._base_norm[1].copy_(squared), self._base_norm[2].copy_(least)
            self._base_norm = weakref.ref(mark), squared, least
        return self._base_norm[1:]

    # -- dropout -----------------------------------------------------------------------------------------------

    @property
    def drops(self) -> bool:
        return self.training and bool(self.dropout or self.rank_dropout or self.module_dropout)

    def _keep(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dropout and rank_dropout on the rank's activations: (B, …, r) or (B, r, h, w)."""
        if not self.is_conv:
            return self.keep_rows((*x.shape[:-1], self.rank), x.device, dtype)
        sides = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in zip(x.shape[2:], self.shape[2:], *self._options)
        )
        return self._combined((len(x), self.rank, *sides), (len(x), self.rank, 1, 1), x.device, dtype)

    def keep_rows(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mask of activations (B, …, n) of n ranks."""
        first = shape[0] if len(shape) > 1 else 1
        return self._combined(shape, (first, *[1] * (len(shape) - 2), shape[-1]), device, dtype)

    def _combined(
        self, elements: Sequence[int], ranks: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        masks, by_sample = [], len(elements) > 1
        if self.dropout:
            masks.append(self.keep(elements, self.dropout, "elements", device, dtype, by_sample))
        if self.rank_dropout:
            masks.append(self.keep(ranks, self.rank_dropout, "ranks", device, dtype, by_sample))
        if self.module_dropout:
            masks.append(self.keep_module(len(elements), device, dtype))
        return functools.reduce(torch.mul, masks)
