"""A Linear layer with its LoRA as one autograd node: the same sums in fewer passes over memory.

Composed of ordinary operations, ``base(x) + scale · up(down(x))`` writes the layer's output three times (base, LoRA,
sum), multiplies it by the scale forwards and backwards, and adds two gradients of the input's size. Here the LoRA's
products are accumulated into the base's by the matrix multiplication itself (``addmm_``), scale included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class LoraLinear(torch.autograd.Function):
    """``x Wᵀ + b + scale · (x downᵀ) upᵀ``; W and b are frozen and get no gradient.

    x (…, in), weight (out, in), bias (out) or None, down (r, in), up (out, r) -> (…, out) in ``dtype``.
    ``dtype`` is the number format of the computation. Frozen weights in another are cast when they are used and the
    cast is dropped, instead of being kept for the backward pass as autograd would.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        output = functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        hidden = rows.mm(down.to(dtype).t())
        output.addmm_(hidden, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, weight, down, up, hidden)
        ctx.scale, ctx.dtype, ctx.input_shape, ctx.input_dtype = scale, dtype, x.shape, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, hidden = ctx.saved_tensors
        dtype = ctx.dtype
        grad = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)
        # The scale goes into the smallest tensor there is, (tokens, r); everything below takes it from there.
        grad_hidden = grad.mm(up.to(dtype))
        if ctx.scale != 1:
            grad_hidden.mul_(ctx.scale)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.mm(weight.to(dtype)).addmm_(grad_hidden, down.to(dtype))
            grad_x = grad_x.view(ctx.input_shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[3]:
            grad_down = grad_hidden.t().mm(rows).to(down.dtype)
        if ctx.needs_input_grad[4]:
            grad_up = grad.t().mm(hidden).to(up.dtype)
            if ctx.scale != 1:
                grad_up.mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None, None
