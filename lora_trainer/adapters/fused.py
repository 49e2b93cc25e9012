"""A layer with its adapter as one autograd node: the same sums with less memory, and in fewer passes over it.

Composed of ordinary operations, ``base(x) + scale · up(down(x))`` writes the layer's output three times (base, LoRA,
sum), multiplies it by the scale forwards and backwards, and adds two gradients of the input's size. Here the LoRA's
products are accumulated into the base's by the matrix multiplication itself (``addmm_``), scale included.

Where the adapter changes the weight itself, ordinary operations keep every layer's changed weight and what it was made
of until the backward pass, several copies of the model. Here it is made again from its few parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from lora_trainer.devices import without_autocast


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


class ChangedLayer(torch.autograd.Function):
    """A Linear layer, or a convolution, with the weight that ``make_weight`` returns; its bias is frozen.

    x (…, in) or (B, in, h, w), bias (out) or None -> (…, out) or (B, out, h', w') in ``dtype``, the number format of
    the computation. ``make_weight`` is called once forwards and once backwards, without autocast, and depends on
    ``parameters`` alone; it returns fp32. ``convolution``: (stride, padding, dilation); None for a Linear layer.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        make_weight: Callable[[], Tensor],
        convolution: tuple | None,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.make_weight, ctx.convolution, ctx.dtype, ctx.parameters = make_weight, convolution, dtype, parameters
        with without_autocast(x.device):
            x, weight = x.to(dtype), make_weight().to(dtype)
            bias = None if bias is None else bias.to(dtype)
            ctx.save_for_backward(x)
            if convolution is None:
                return functional.linear(x, weight, bias)
            return functional.conv2d(x, weight, bias, *convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        learning = [parameter for parameter, needed in zip(ctx.parameters, ctx.needs_input_grad[5:]) if needed]
        with without_autocast(x.device):
            with torch.enable_grad():
                weight = ctx.make_weight()
            grad, frozen, grad_x = grad_output.to(ctx.dtype), weight.detach().to(ctx.dtype), None
            if ctx.convolution is None:
                if ctx.needs_input_grad[0]:
                    grad_x = grad @ frozen
                grad_weight = grad.reshape(-1, grad.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))
            else:
                if ctx.needs_input_grad[0]:
                    grad_x = conv2d_input(x.shape, frozen, grad, *ctx.convolution)
                grad_weight = conv2d_weight(x, frozen.shape, grad, *ctx.convolution)
            found = iter(torch.autograd.grad(weight, learning, grad_weight.to(weight.dtype)) if learning else ())
        grads = [next(found) if needed else None for needed in ctx.needs_input_grad[5:]]
        return None if grad_x is None else grad_x.to(ctx.input_dtype), None, None, None, None, *grads
