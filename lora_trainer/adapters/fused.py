"""A layer with its adapter as one autograd node: the same sums with less memory, and in fewer passes over it.

Composed of ordinary operations, ``base(x) + scale · up(down(x))`` writes the layer's output three times (base, LoRA,
sum), multiplies it by the scale forwards and backwards, and adds two gradients of the input's size. Here the LoRA's
products are accumulated into the base's by the matrix multiplication itself (``addmm_``), scale included.

Where the adapter changes the weight itself, ordinary operations keep every layer's changed weight and what it was made
of until the backward pass, several copies of the model. Here it is made again from its few parameters.

``dtype`` is the number format of the computation, in which the output is. Frozen weights in another are cast when they
are used and the cast is dropped, instead of being kept for the backward pass as autograd would. ``keep``, where given,
multiplies the rank's activations: dropout's mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from lora_trainer.convolution import convolve, input_gradient
from lora_trainer.devices import is_compiling, without_autocast
from lora_trainer.storage import as_stored, dense_weight, form_of


class LoraLinear(torch.autograd.Function):
    """``W (g ⊙ x) + b + scale · up(keep ⊙ down(g ⊙ x))``; W and b are frozen and get no gradient.

    x (…, in), weight (out, in[, 1, 1]), bias (out) or None, down (r, in), up (out, r), gain g (in) or None, keep
    broadcastable to (…, r) or None -> (…, out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        keep: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.gain_dtype, gain = (None, None) if gain is None else (gain.dtype, gain.to(dtype))
        scaled = rows if gain is None else rows * gain
        matrix = dense_weight(weight, dtype).flatten(1)
        output = functional.linear(scaled, matrix, None if bias is None else bias.to(dtype))
        hidden = scaled.mm(down.to(dtype).t())
        if keep is not None:
            hidden.view(*x.shape[:-1], -1).mul_(keep)
        output.addmm_(hidden, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, weight, down, up, gain, keep, hidden)
        ctx.form = form_of(weight)
        ctx.scale, ctx.dtype, ctx.input_shape, ctx.input_dtype = scale, dtype, x.shape, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, gain, keep, hidden = ctx.saved_tensors
        dtype, needed = ctx.dtype, ctx.needs_input_grad
        grad = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)
        # The scale goes into the smallest tensor there is, (tokens, r); everything below takes it from there.
        grad_hidden = _masked(grad.mm(up.to(dtype)), keep, ctx.input_shape, ctx.scale)
        grad_x = grad_down = grad_up = grad_gain = None
        if needed[0] or needed[5]:
            matrix, low_down = dense_weight(as_stored(weight, ctx.form), dtype).flatten(1), down.to(dtype)
            if rows.stride(0) == 1:  # a picture seen as tokens: its gradient lies in memory as the picture does
                grad_x = matrix.t().mm(grad.t()).addmm_(low_down.t(), grad_hidden.t()).t()
            else:
                grad_x = grad.mm(matrix).addmm_(grad_hidden, low_down)
        if needed[3]:
            grad_down = grad_hidden.t().mm(rows)
            grad_down = (grad_down if gain is None else grad_down.mul_(gain)).to(down.dtype)
        if needed[4]:
            grad_up = grad.t().mm(hidden).to(up.dtype)
            if ctx.scale != 1:
                grad_up.mul_(ctx.scale)
        if needed[5]:
            grad_gain = (grad_x * rows).sum(0, dtype=ctx.gain_dtype)
        if needed[0] and grad_x is not None:
            grad_x = grad_x if gain is None else grad_x.mul_(gain)
            grad_x = grad_x.view(ctx.input_shape).to(ctx.input_dtype)
        return grad_x if needed[0] else None, None, None, grad_down, grad_up, grad_gain, None, None, None


def _masked(grad_hidden: Tensor, keep: Tensor | None, input_shape: torch.Size, scale: float) -> Tensor:
    if keep is not None:
        grad_hidden.view(*input_shape[:-1], -1).mul_(keep)
    return grad_hidden if scale == 1 else grad_hidden.mul_(scale)


class LoraLinears(torch.autograd.Function):
    """n Linear layers without bias on one input, each with a LoRA of the same rank and scale: q, k and v of attention.

    x (…, in), ``layers``: n weights (out, in) -> n tensors (…, out).
    ``factors``: the n downs (r, in) and the n ups (out, r); or one tensor of all downs (n·r, in) and one of all ups
    (n, out, r). keep: broadcastable to (…, n·r).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Tensor | None, scale: float, dtype: torch.dtype, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, factors = tensors[:count], tensors[count:]
        down, up = _stacked(factors, dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        hidden = rows.mm(down.t())  # (tokens, n·r)
        if keep is not None:
            hidden.view(*x.shape[:-1], -1).mul_(keep)
        outputs = rows.new_empty(count, len(rows), up.shape[1])
        for output, weight in zip(outputs, weights):
            torch.mm(rows, dense_weight(weight, dtype).t(), out=output)
        outputs.baddbmm_(_by_layer(hidden, count), up.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(rows, hidden, keep, *tensors)
        ctx.forms = [form_of(weight) for weight in weights]
        ctx.scale, ctx.dtype, ctx.count, ctx.input_shape, ctx.input_dtype = scale, dtype, count, x.shape, x.dtype
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, keep, *tensors = ctx.saved_tensors
        weights, factors = list(map(as_stored, tensors[: ctx.count], ctx.forms)), tensors[ctx.count :]
        down, up = _stacked(factors, ctx.dtype)
        grad = torch.stack([grad.reshape(len(rows), -1) for grad in grad_outputs]).to(ctx.dtype)  # (n, tokens, out)
        if is_compiling():  # torch.compile takes no view as ``out``
            grad_hidden = grad.bmm(up).transpose(0, 1).reshape(hidden.shape)
        else:
            grad_hidden = torch.empty_like(hidden)
            torch.bmm(grad, up, out=_by_layer(grad_hidden, ctx.count))
        grad_hidden = _masked(grad_hidden, keep, ctx.input_shape, ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            first, *others = zip(grad, weights)
            grad_x = first[0].mm(dense_weight(first[1], ctx.dtype))
            for part, weight in others:
                grad_x.addmm_(part, dense_weight(weight, ctx.dtype))
            grad_x = grad_x.addmm_(grad_hidden, down).view(ctx.input_shape).to(ctx.input_dtype)
        grads: list[Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[5 + ctx.count :]):
            grad_down = grad_hidden.t().mm(rows).to(factors[0].dtype)
            grad_up = torch.bmm(grad.transpose(1, 2), _by_layer(hidden, ctx.count)).to(factors[0].dtype)
            if ctx.scale != 1:
                grad_up.mul_(ctx.scale)
            grads = [grad_down, grad_up]
            if len(factors) > 2:
                grads = [*grad_down.chunk(ctx.count), *grad_up.unbind()]
        return grad_x, None, None, None, None, *[None] * ctx.count, *grads


def _stacked(factors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n·r, in) and (n, out, r)."""
    if len(factors) == 2:
        return factors[0].to(dtype), factors[1].to(dtype)
    half = len(factors) // 2
    return torch.cat(list(factors[:half])).to(dtype), torch.stack(list(factors[half:])).to(dtype)


def _by_layer(hidden: Tensor, count: int) -> Tensor:
    """(tokens, n·r) seen as (n, tokens, r)."""
    return hidden.view(len(hidden), count, -1).transpose(0, 1)


class LoraConv2d(torch.autograd.Function):
    """The same as ``LoraLinear`` for a convolution: down has the kernel and the options of the layer, up is 1 × 1.

    x (B, in, h, w), weight (out, in, kh, kw), down (r, in, kh, kw), up (out, r, 1, 1), gain (1, in, 1, 1), keep
    broadcastable to (B, r, h', w') -> (B, out, h', w'). options: stride, padding, dilation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        keep: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        options: tuple,
    ) -> Tensor:
        ctx.input_dtype, x = x.dtype, x.to(dtype)
        ctx.gain_dtype, gain = (None, None) if gain is None else (gain.dtype, gain.to(dtype))
        scaled = x if gain is None else x * gain
        bias = None if bias is None else bias.to(dtype)
        output = convolve(scaled, dense_weight(weight, dtype), bias, *options)
        hidden = functional.conv2d(scaled, down.to(dtype), None, *options)
        if keep is not None:
            hidden.mul_(keep)
        _add_pointwise(output, hidden, up.to(dtype), scale)
        ctx.save_for_backward(x, weight, down, up, gain, keep, hidden)
        ctx.scale, ctx.dtype, ctx.options = scale, dtype, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, gain, keep, hidden = ctx.saved_tensors
        dtype, needed, options = ctx.dtype, ctx.needs_input_grad, ctx.options
        grad, low_up, low_down = grad_output.to(dtype), up.to(dtype), down.to(dtype)
        grad_hidden = functional.conv2d(grad, low_up.transpose(0, 1))
        if keep is not None:
            grad_hidden.mul_(keep)
        if ctx.scale != 1:
            grad_hidden.mul_(ctx.scale)
        grad_x = grad_down = grad_up = grad_gain = None
        if needed[0] or needed[5]:
            grad_x = input_gradient(x.shape, dense_weight(weight, dtype), grad, *options)
            grad_x.add_(input_gradient(x.shape, low_down, grad_hidden, *options))
        if needed[3]:
            grad_down = conv2d_weight(x, down.shape, grad_hidden, *options)
            grad_down = (grad_down if gain is None else grad_down.mul_(gain)).to(down.dtype)
        if needed[4]:
            grad_up = conv2d_weight(hidden, up.shape, grad).to(up.dtype)
            if ctx.scale != 1:
                grad_up.mul_(ctx.scale)
        if needed[5]:
            grad_gain = (grad_x * x).sum((0, 2, 3), keepdim=True, dtype=ctx.gain_dtype)
        if needed[0] and grad_x is not None:
            grad_x = (grad_x if gain is None else grad_x.mul_(gain)).to(ctx.input_dtype)
        return grad_x if needed[0] else None, None, None, grad_down, grad_up, grad_gain, None, None, None, None


def _add_pointwise(output: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> None:
    """output += scale · conv(hidden, weight), in place. output (B, out, h, w), weight (out, r, 1, 1)."""
    if not (output.is_contiguous() and hidden.is_contiguous()):  # channels last
        output.add_(functional.conv2d(hidden, weight), alpha=scale)
        return
    matrix = weight.flatten(1)
    for_all = matrix.expand(len(output), *matrix.shape)
    output.flatten(2).baddbmm_(for_all, hidden.flatten(2), alpha=scale)


class ChangedLayer(torch.autograd.Function):
    """A Linear layer, or a convolution, with the weight that ``make_weight`` returns; its bias is frozen.

    x (…, in) or (B, in, h, w), bias (out) or None -> (…, out) or (B, out, h', w'). ``make_weight`` is called once
    forwards and once backwards, without autocast, and depends on ``parameters`` alone; it returns fp32.
    ``convolution``: (stride, padding, dilation); None for a Linear layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
            return convolve(x, weight, bias, *convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
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
                    grad_x = input_gradient(x.shape, frozen, grad, *ctx.convolution)
                grad_weight = conv2d_weight(x, frozen.shape, grad, *ctx.convolution)
            found = iter(torch.autograd.grad(weight, learning, grad_weight.to(weight.dtype)) if learning else ())
        grads = [next(found) if needed else None for needed in ctx.needs_input_grad[5:]]
        return None if grad_x is None else grad_x.to(ctx.input_dtype), None, None, None, None, *grads
