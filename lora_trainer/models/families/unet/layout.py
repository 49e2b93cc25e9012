"""Convolutions of a UNet whose weights lie channels last in memory (NHWC), level by level.

With fp16 and bf16 a card's tensor cores read pictures that way: where the weight does not lie so, cuDNN rearranges the
input, the weight and the output at every call. torch's GroupNorm, however, makes its input contiguous again. Which of
the two layouts is faster is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_trainer.models.casting import CastConv2d

_ROUNDS = 9
_WARM_UP = 2
_IN_A_ROW = 5
"""Passes on a card from one wait for it to the next."""
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class LayoutTimes:
    """Of a level's resnet, forward and backward: milliseconds with weights as they are stored, and channels last."""

    stored: float
    channels_last: float


def levels_of(unet: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each level, from the highest resolution down; the middle block is of the last one."""
    levels = [list(pair) for pair in zip(unet.down_blocks, reversed(list(unet.up_blocks)))]
    levels[-1].append(unet.mid_block)
    return levels


def lay_out(parts: Sequence[nn.Module]) -> None:
    """Bring the weights of the convolutions in these parts into channels last, one after the other."""
    for layer in _convolutions(parts):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def layout_times(
    unet: nn.Module, size: tuple[int, int], batch_size: int, device: torch.device, dtype: torch.dtype
) -> list[LayoutTimes]:
    """Of each level, on ``batch_size`` latents of ``size`` (width, height). The weights are left as they were.

    Raises:
        RuntimeError: the device has no memory for it.
    """
    found = []
    for number, (first, *_) in enumerate(levels_of(unet)):
        width, height = (-(-side // 2**number) for side in size)
        resnet = first.resnets[-1]
        channels, embedded = resnet.conv1.in_channels, resnet.time_emb_proj.in_features
        picture = torch.ones(batch_size, channels, height, width, device=device, dtype=dtype, requires_grad=True)
        found.append(_times(resnet, picture, torch.zeros(batch_size, embedded, device=device, dtype=dtype)))
    return found


def _times(resnet: nn.Module, picture: torch.Tensor, embedding: torch.Tensor) -> LayoutTimes:
    layers = _convolutions([resnet])
    before = [layer.weight.data for layer in layers]
    laid_out = [[weight.contiguous(memory_format=layout) for weight in before] for layout in _LAYOUTS]
    on_card = picture.device.type == "cuda"

    def milliseconds(weights: Sequence[torch.Tensor]) -> float:
        for layer, weight in zip(layers, weights):
            layer.weight.data = weight
        started = time.perf_counter()
        for _ in range(_IN_A_ROW if on_card else 1):
            output = resnet(picture, embedding)
            torch.autograd.grad(output, picture, torch.ones_like(output, memory_format=torch.contiguous_format))
        if on_card:
            torch.cuda.synchronize(picture.device)
        return (time.perf_counter() - started) * 1000 / (_IN_A_ROW if on_card else 1)

    try:
        rounds = [[milliseconds(weights) for weights in laid_out] for _ in range(_WARM_UP + _ROUNDS)]
    finally:
        for layer, weight in zip(layers, before):
            layer.weight.data = weight
    return LayoutTimes(*map(statistics.median, zip(*rounds[_WARM_UP:])))


def _convolutions(parts: Sequence[nn.Module]) -> list[CastConv2d]:
    """Those with more than one position; of others both layouts are the same."""
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, CastConv2d)]
    return [layer for layer in layers if layer.kernel_size != (1, 1)]
