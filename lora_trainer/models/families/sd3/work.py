"""What a training step of Stable Diffusion 3 computes and keeps in memory, and a piece of it to measure a device with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.casting import cast_layers
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.model import T5_LENGTH
from lora_trainer.models.families.sd3.network import JointBlock
from lora_trainer.models.family import LatentFormat, Trial
from lora_trainer.models.prompts import CHUNK
from lora_trainer.models.work import Learning, Part, lora_work

TEXT = CHUNK + 2 + T5_LENGTH
"""Tokens of a caption of one chunk."""


def parts(
    shape: Sd3Shape, latents: LatentFormat, resolution: tuple[int, int], config: TrainConfig
) -> Iterator[Part]:
    """The parts of one batch, whatever layers of the blocks learn."""
    width, height = latents.size(*resolution)
    image = (width // 2) * (height // 2)
    tokens = config.batch_size * image
    frozen = 2 * shape.width * (8 * shape.channels * tokens + shape.context_dim * config.batch_size * TEXT)
    yield Part(frozen, frozen, 4 * shape.width * tokens)
    for index in range(shape.blocks):
        yield _block(shape, image, config, dual=index < shape.dual)


def _block(shape: Sd3Shape, image: int, config: TrainConfig, *, dual: bool) -> Part:
    learning, rank, width, hidden = Learning(config), config.lora_rank, shape.width, shape.hidden
    length = image + TEXT
    tokens, alone = config.batch_size * length, config.batch_size * image if dual else 0
    attention = ((width, 3 * width), (width, width))
    pairs = (*attention, (width, hidden), (hidden, width))
    low_rank = sum(lora_work(into, out, rank) for into, out in pairs) * tokens
    low_rank += sum(lora_work(into, out, rank) for into, out in attention) * alone
    frozen = 2 * (4 * width**2 + 2 * width * hidden) * tokens + 2 * 4 * width**2 * alone
    frozen += 2 * (15 if dual else 12) * width**2 * config.batch_size
    products = 4 * width * (length * tokens + image * alone)
    # Of each token: the block's input, both normalizations with what they are scaled by, q, k and v before and after
    # their normalization (in fp32 for a while), what came of the attention; the MLP before and after its activation;
    # the products that are gated.
    kept = (18 * width + 3 * hidden + len(pairs) * learning.hidden(rank)) * tokens
    kept += (10 * width + len(attention) * learning.hidden(rank)) * alone
    forwards, backwards = learning.passes(frozen, low_rank)
    return Part(forwards + products, backwards + 2 * products, kept, width * tokens)


def trial(
    shape: Sd3Shape, latents: LatentFormat, resolution: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Trial:
    """A block with random weights on one picture of ``resolution`` (width, height)."""
    width, height = latents.size(*resolution)
    image = max(1, height // 2) * max(1, width // 2)
    block = JointBlock(shape, last=False, dual=False).requires_grad_(False)
    for name, weight in block.named_parameters():
        if ".ln_" in name:
            torch.nn.init.ones_(weight)
    block = block.to(device, dtype)
    cast_layers(block, dtype)
    tokens = torch.randn(1, TEXT + image, shape.width, device=device, dtype=dtype).requires_grad_()
    vector = torch.randn(1, shape.width, device=device, dtype=dtype)

    def forward(tokens: Tensor) -> Tensor:
        context, x = block(tokens[:, :TEXT], tokens[:, TEXT:], vector.expand(len(tokens), -1))
        return torch.cat([context, x], dim=1)

    part = _block(shape, image, TrainConfig(batch_size=1, lora_rank=0), dual=False)
    return Trial(forward, tokens, part.forwards + part.backwards, shape.blocks)
