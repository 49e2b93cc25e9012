"""What a training step of FLUX.1 computes and keeps in memory, and a piece of it to measure a device with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.flow.architecture import FlowArchitecture
from lora_trainer.models.families.flow.tokenizer import LENGTH
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.network import SingleBlock, rotations
from lora_trainer.models.families.unet.work import text_layer
from lora_trainer.models.family import LatentFormat, Trial
from lora_trainer.models.work import Learning, Part, lora_work


def parts(
    architecture: FlowArchitecture, latents: LatentFormat, resolution: tuple[int, int], config: TrainConfig
) -> Iterator[Part]:
    """The parts of one batch, whatever layers of the blocks learn."""
    shape = architecture.transformer
    width, height = latents.size(*resolution)
    image = (width // 2) * (height // 2)
    yield from _ends(shape, image, config)
    yield from [_block(shape, image, config, double=True)] * shape.double
    yield from [_block(shape, image, config, double=False)] * shape.single
    if config.text_encoders_learn:
        for clip in architecture.clips:
            yield from [text_layer(clip, config)] * clip.layers


def _ends(shape: FluxShape, image: int, config: TrainConfig) -> Iterator[Part]:
    tokens = config.batch_size * image
    frozen = 2 * shape.width * (2 * shape.channels * tokens + shape.context_dim * config.batch_size * LENGTH)
    yield Part(frozen, frozen, 4 * shape.width * tokens)


def _block(shape: FluxShape, image: int, config: TrainConfig, *, double: bool) -> Part:
    """A block of either kind: both have as many weights for a token, 12 width² where the MLP is four times as wide."""
    learning, rank, width, hidden = Learning(config), config.lora_rank, shape.width, shape.hidden
    length = image + LENGTH
    tokens = config.batch_size * length
    frozen = 2 * (4 * width**2 + 2 * width * hidden) * tokens
    pairs: tuple[tuple[int, int], ...]
    if double:
        pairs = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
        modulations = 12
    else:
        pairs = ((width, 3 * width + hidden), (width + hidden, width))
        modulations = 3
    low_rank = sum(lora_work(into, out, rank) for into, out in pairs) * tokens
    frozen += 2 * modulations * width**2 * config.batch_size
    attention = 4 * width * length * tokens
    # Of each token: the block's input, both normalizations with what they are scaled by, q, k and v before and after
    # their normalization and rotation (in fp32 for a while), what came of the attention; the MLP before and after its
    # activation; the products that are gated.
    kept = (18 * width + 3 * hidden + len(pairs) * learning.hidden(rank)) * tokens
    forwards, backwards = learning.passes(frozen, low_rank)
    return Part(forwards + attention, backwards + 2 * attention, kept, width * tokens)


def trial(
    shape: FluxShape, latents: LatentFormat, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Trial:
    """A single block with random weights on one picture of ``resolution`` (width, height)."""
    width, height = latents.size(*resolution)
    size = max(1, height // 2), max(1, width // 2)
    block = SingleBlock(shape).requires_grad_(False)
    for scale in (block.norm.query_norm.scale, block.norm.key_norm.scale):
        torch.nn.init.ones_(scale)
    block = block.to(device, dtype)
    cast_layers(block, dtype)
    tokens = torch.randn(1, LENGTH + size[0] * size[1], shape.width, device=device, dtype=dtype).requires_grad_()
    vector = torch.randn(1, shape.width, device=device, dtype=dtype)
    rotation = rotations(LENGTH, size, shape.axes, device)

    def forward(tokens: Tensor) -> Tensor:
        return block(tokens, vector.expand(len(tokens), -1), rotation)

    part = _block(shape, size[0] * size[1], TrainConfig(batch_size=1, lora_rank=0), double=False)
    return Trial(forward, tokens, part.forwards + part.backwards, shape.double + shape.single)
