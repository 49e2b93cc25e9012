"""A resnet and a transformer block of a UNet, to measure a device with."""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.unet.architecture import UNetShape
from lora_trainer.models.families.unet.blocks import slim
from lora_trainer.models.families.unet.work import CONTEXT_TOKENS, piece_operations, pieces
from lora_trainer.models.family import LatentFormat, Trial


def trial(
    shape: UNetShape, latents: LatentFormat, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Trial:
    """One of each of the UNet's second level, with random weights, on pictures of ``resolution`` (width, height)."""
    level = min(1, len(shape.channels) - 1)
    channels, heads = shape.channels[level], shape.heads[level]
    width, height = (-(-side // 2**level) for side in latents.size(*resolution))
    here = {"device": device, "dtype": dtype}
    resnet = ResnetBlock2D(in_channels=channels, temb_channels=None)
    block = BasicTransformerBlock(channels, heads, channels // heads, cross_attention_dim=shape.context_dim)
    for part in (resnet, block):
        part.requires_grad_(False).to(**here)
        cast_layers(part, dtype)
        slim(part)
    picture = torch.randn(1, channels, height, width, **here).requires_grad_()
    text = torch.randn(1, CONTEXT_TOKENS, shape.context_dim, **here)

    def forward(picture: Tensor) -> Tensor:
        tokens = resnet(picture, None).flatten(2).transpose(1, 2)
        return block(tokens, encoder_hidden_states=text.expand(len(picture), -1, -1))

    return Trial(forward, picture, piece_operations(shape, latents, resolution, level), pieces(shape, latents))
