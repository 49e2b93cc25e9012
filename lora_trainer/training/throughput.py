"""How fast a device trains, tried on a piece of the model instead of on all of it."""

from __future__ import annotations

import time

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from lora_trainer.models.families.unet.architecture import UNetShape
from lora_trainer.training.forecast import CONTEXT_TOKENS, piece_operations
from lora_trainer.training.precision import Precision

_SECONDS = 0.3
"""Tried at least so long."""


def throughput(shape: UNetShape, precision: Precision, resolution: tuple[int, int]) -> float:
    """Floating-point operations per second, as ``forecast`` counts them, of training a UNet of this shape on pictures
    of ``resolution`` (width, height).

    A resnet and a transformer block of its second level, with random weights, compute an output and the gradient of
    their input. Takes less than a second on a GPU, some on a CPU; to be called in a turn of the lender's.

    Raises:
        RuntimeError: the device has no memory for it.
    """
    level = min(1, len(shape.channels) - 1)
    channels, heads = shape.channels[level], shape.heads[level]
    width, height = (-(-(side // 8) // 2**level) for side in resolution)
    here = {"device": precision.device, "dtype": precision.weight_dtype}
    resnet = ResnetBlock2D(in_channels=channels, temb_channels=None)
    block = BasicTransformerBlock(channels, heads, channels // heads, cross_attention_dim=shape.context_dim)
    for part in (resnet, block):
        part.requires_grad_(False).to(**here)
    picture = torch.randn(1, channels, height, width, **here).requires_grad_()
    text = torch.randn(1, CONTEXT_TOKENS, shape.context_dim, **here)

    def compute() -> None:
        with precision.autocast():
            tokens = resnet(picture, None).flatten(2).transpose(1, 2)
            output = block(tokens, encoder_hidden_states=text)
        output.float().sum().backward()
        picture.grad.sum().item()  # which waits for the device, of whatever kind
        picture.grad = None

    compute()  # kernels are chosen and loaded
    times, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        compute()
        times += 1
    return times * piece_operations(shape, resolution, level) / elapsed
