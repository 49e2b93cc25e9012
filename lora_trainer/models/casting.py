"""Layers whose frozen weights may have another number format than the computation.

A lender's weights are used as they are. Where their dtype differs from the compute dtype, each layer casts its own
weight when it runs, and casts it once more in the backward pass, so that neither the module nor the autograd graph
ever holds a second copy of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_trainer.convolution import convolve, input_gradient
from lora_trainer.storage import as_stored, dense_weight, form_of, packing_of


def cast_layers(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Make every Linear, Conv2d, GroupNorm, LayerNorm and Embedding under ``module`` compute in ``compute_dtype``.

    Changes the layers' class, not their ``forward`` attribute: adapters may replace and restore that one.
    """
    for layer in module.modules():
        for base, replacement in _REPLACEMENTS:
            if isinstance(layer, base):
                layer.__class__ = replacement
                layer.compute_dtype = compute_dtype
                break


class _LinearFunction(torch.autograd.Function):
    """``F.linear`` with a frozen weight that is cast again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes, ctx.form = (x.dtype, dtype), form_of(weight)
        return F.linear(x.to(dtype), dense_weight(weight, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        return (grad.to(dtype) @ dense_weight(as_stored(weight, ctx.form), dtype)).to(x_dtype), None, None, None


class _Conv2dFunction(torch.autograd.Function):
    """The same for a convolution with zero padding; autograd would keep its input as well, for no one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, options: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes, ctx.options, ctx.shape = (x.dtype, dtype), options, x.shape
        return convolve(x.to(dtype), dense_weight(weight, dtype), None if bias is None else bias.to(dtype), *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        x_dtype, dtype = ctx.dtypes
        grad_x = input_gradient(ctx.shape, dense_weight(weight, dtype), grad.to(dtype), *ctx.options)
        return grad_x.to(x_dtype), None, None, None, None


class CastLinear(nn.Linear):
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == self.compute_dtype and packing_of(self.weight) is None:
            return super().forward(x)
        return _LinearFunction.apply(x, self.weight, self.bias, self.compute_dtype)


class CastConv2d(nn.Conv2d):
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        options = (self.stride, self.padding, self.dilation, self.groups)
        if self.weight.dtype == self.compute_dtype == x.dtype and not needs_gradient:
            return convolve(x, self.weight, self.bias, *options)
        return _Conv2dFunction.apply(x, self.weight, self.bias, self.compute_dtype, options)


class CastGroupNorm(nn.GroupNorm):
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = dense_weight(self.weight, self.compute_dtype), self.bias.to(self.compute_dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class CastLayerNorm(nn.LayerNorm):
    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = dense_weight(self.weight, self.compute_dtype), self.bias.to(self.compute_dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class CastEmbedding(nn.Embedding):
    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        packing = packing_of(self.weight)
        if packing is not None and packing.shape_of(self.weight) != tuple(self.weight.shape):  # blocks, not rows
            return F.embedding(ids, dense_weight(self.weight, self.compute_dtype))
        if self.weight.element_size() == 1:  # rows of fp8 are no numbers to torch's lookup
            rows = self.weight.view(torch.uint8)[ids].view(self.weight.dtype)
            # One scale for all of them.
            return rows.to(self.compute_dtype) if packing is None else packing.unpack(rows, self.compute_dtype)
        return super().forward(ids).to(self.compute_dtype)


_REPLACEMENTS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, CastLinear),
    (nn.Conv2d, CastConv2d),
    (nn.GroupNorm, CastGroupNorm),
    (nn.LayerNorm, CastLayerNorm),
    (nn.Embedding, CastEmbedding),
)
