"""Convolutions that the CPU computes as one matrix product where that is quicker.

torch's convolution on the CPU (oneDNN) rearranges the whole weight at every call, which takes longer than the sums
where the weight is large and the picture small, as in the deepest levels of a UNet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

Pair = tuple[int, int]

LARGE_WEIGHT = 10_000_000
"""Numbers of a weight from which on the product is quicker (measured, fp32, with one thread and two: at most 0.9 of
the time with 11 million numbers and 64 positions; with 7.4 million 1.0 to 1.3)."""
FEW_POSITIONS = 256
"""Of all output pictures together, up to which it is (with 512: 1.0 to 1.3 of the time)."""


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
) -> Tensor:
    """``conv2d`` with zeros around the picture. x (B, in, h, w), weight (out, in, kh, kw), bias (out) or None
    -> (B, out, h', w')."""
    height, width = (
        (side + 2 * pad - reach * (kernel - 1) - 1) // step + 1
        for side, pad, reach, kernel, step in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)
    )
    if not _by_product(x, weight, len(x) * height * width, dilation, groups):
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])
    columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(weight[0].numel(), -1)  # (in·kh·kw, B·h'·w')
    matrix = weight.flatten(1)
    product = matrix.mm(columns) if bias is None else torch.addmm(bias[:, None], matrix, columns)
    return product.view(len(weight), len(x), height, width).transpose(0, 1).contiguous()


def input_gradient(
    shape: torch.Size, weight: Tensor, grad: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
) -> Tensor:
    """``conv2d_input``: the gradient of ``convolve``'s x. shape: (B, in, h, w), its own; grad (B, out, h', w')."""
    if not _by_product(grad, weight, len(grad) * grad.shape[2] * grad.shape[3], dilation, groups):
        return conv2d_input(shape, weight, grad, stride, padding, dilation, groups)
    columns = weight.flatten(1).t().mm(grad.transpose(0, 1).flatten(1))  # (in·kh·kw, B·h'·w')
    by_picture = columns.view(len(columns), len(grad), -1).transpose(0, 1)
    return functional.fold(by_picture, shape[2:], weight.shape[2:], padding=padding, stride=stride)


def _by_product(x: Tensor, weight: Tensor, positions: int, dilation: Pair, groups: int) -> bool:
    """Is decided by shapes, so that equal sums are made in the same way. Products with eight columns or fewer are not
    taken: MKL rounds them by where in memory the weight begins."""
    return (
        weight.numel() >= LARGE_WEIGHT
        and 8 < positions <= FEW_POSITIONS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and groups == 1
        and tuple(dilation) == (1, 1)
    )
