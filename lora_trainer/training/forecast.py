"""What a training step computes and keeps in memory, from the model's architecture alone.

Counted are the layers that take the time: convolutions, Linear layers and attention. A frozen layer works twice, for
its output and for the gradient of its input; a LoRA three times, since its own weights get gradients as well, and so
does attention, a product of two activations. Kept for the backward pass is what autograd and our own node
(``adapters.fused``) save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from lora_trainer.adapters.base import weight_shape
from lora_trainer.adapters.inject import choose
from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.architecture import Architecture, TextShape, UNetShape
from lora_trainer.models.base import LoraTarget
from lora_trainer.models.binding import build_text_encoder, build_unet, build_vae
from lora_trainer.models.targets import lora_targets
from lora_trainer.training.precision import Precision

CONTEXT_TOKENS = 77
_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "lion": 4, "adafactor": 4}
"""For each trained number, beside the 4 of itself and the 4 of its gradient."""
_ENCODER_COPIES = 5
"""Pictures of the VAE's first width that are there at once while one is encoded (measured)."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass.

    operations: floating-point operations; a multiplication and an addition count as two.
    kept: numbers in memory at the fullest moment, in the format of the computation. With LoHa there are a little
        more, which depend on the weights alone.
    """

    operations: float
    kept: float


@dataclass(frozen=True)
class _Part:
    """What gradient checkpointing computes anew as a whole, or a layer that it leaves alone.

    forwards, backwards: operations. kept: numbers saved between them. inputs: those of them that remain when it is
    checkpointed; None where it never is.
    """

    forwards: float
    backwards: float
    kept: float
    inputs: float | None = None


def work_on_batch(architecture: Architecture, resolution: tuple[int, int], config: TrainConfig) -> Work:
    """The work on one batch of pictures of ``resolution`` (width, height), whatever layers of the UNet learn."""
    operations = kept = largest = 0.0
    parts = list(_Walk(architecture.unet, resolution, config).parts())
    if config.train_text_encoder:
        for shape in architecture.text_encoders:
            parts += [_text_layer(shape, config)] * shape.layers
    for part in parts:
        again = config.gradient_checkpointing and part.inputs is not None
        operations += part.forwards * (2 if again else 1) + part.backwards
        kept += part.inputs if again else part.kept
        largest = max(largest, part.kept if again else 0)
    return Work(operations, kept + largest)


def piece_operations(shape: UNetShape, resolution: tuple[int, int], level: int) -> float:
    """Operations of one resnet and one transformer block of a level, there and back, on one picture, without LoRAs."""
    walk = _Walk(shape, resolution, TrainConfig(batch_size=1, lora_rank=0, conv_rank=0))
    channels = shape.channels[level]
    *_, block = walk._transformer(channels, 1, level)
    return sum(part.forwards + part.backwards for part in (walk._resnet(channels, channels, level), block))


class _Walk:
    """The parts of a UNet in the order in which they run."""

    def __init__(self, shape: UNetShape, resolution: tuple[int, int], config: TrainConfig):
        self._shape, self._batch = shape, config.batch_size
        self._rank, self._conv_rank, self._dora = config.lora_rank, config.conv_rank, config.dora
        self._text_learns = config.train_text_encoder
        width, height = (side // 8 for side in resolution)
        levels = range(len(shape.channels))
        self._areas = [self._batch * -(-height // 2**level) * -(-width // 2**level) for level in levels]

    def parts(self) -> Iterator[_Part]:
        shape, last = self._shape, len(self._shape.channels) - 1
        before = shape.channels[0]
        yield self._conv(4, before, 0)
        skips = [before]
        for level, channels in enumerate(shape.channels):
            for _ in range(shape.layers[level]):
                yield from self._layer(before, channels, level)
                before = channels
                skips.append(channels)
            if level < last:
                yield self._conv(channels, channels, level + 1)
                skips.append(channels)
        yield self._resnet(before, before, last)
        yield from self._transformer(before, shape.mid_depth, last)
        yield self._resnet(before, before, last)
        for level, channels in reversed(list(enumerate(shape.channels))):
            for _ in range(shape.layers[level] + 1):
                yield from self._layer(before + skips.pop(), channels, level)
                before = channels
            if level > 0:
                yield self._conv(channels, channels, level - 1)
        yield self._conv(before, 4, 0)

    def _layer(self, into: int, out: int, level: int) -> Iterator[_Part]:
        yield self._resnet(into, out, level)
        yield from self._transformer(out, self._shape.depths[level], level)

    def _conv(self, into: int, out: int, level: int) -> _Part:
        area = self._areas[level]
        frozen, trained = 2 * 9 * into * out * area, _lora(9 * into, out, self._conv_rank) * area
        return _Part(frozen + trained, frozen + 2 * trained, into * area)

    def _resnet(self, into: int, out: int, level: int) -> _Part:
        area = self._areas[level]
        shortcut = into * out if into != out else 0
        frozen = 2 * (9 * (into + out) * out + shortcut) * area
        trained = (_lora(9 * into, out, self._conv_rank) + _lora(9 * out, out, self._conv_rank)) * area
        # Twice a normalization, an activation and a convolution, each of which keeps what it was given.
        return _Part(frozen + trained, frozen + 2 * trained, 3 * (into + out) * area, into * area)

    def _transformer(self, channels: int, depth: int, level: int) -> Iterator[_Part]:
        if not depth:
            return
        area, tokens, rank = self._areas[level], self._batch * CONTEXT_TOKENS, self._rank
        context, wide = self._shape.context_dim, 4 * channels
        frozen, trained = 4 * channels**2 * area, 2 * _lora(channels, channels, rank) * area
        ends = (5 if self._dora else 3) * channels * area
        yield _Part(frozen + trained, frozen + 2 * trained, ends)  # in and out of the transformer

        # q k v and out of the image, q and out of the text; in and out of the feed-forward layer and its gate.
        frozen = 2 * (6 * channels**2 + 3 * channels * wide) * area
        reading = 2 * 2 * context * channels * tokens  # k v of the text, which needs a gradient only if it learns
        trained = 6 * _lora(channels, channels, rank) + _lora(channels, 2 * wide, rank) + _lora(wide, channels, rank)
        trained = trained * area + 2 * _lora(context, channels, rank) * tokens
        attention = 4 * channels * area * (area // self._batch + CONTEXT_TOKENS)
        # Three times a normalization's input and output, q k v and what came of them, q and what came of the text;
        # both halves of the feed-forward layer, the activated gate and the product.
        kept = (12 * channels + 4 * wide + 10 * rank) * area + 2 * channels * tokens
        if self._dora:  # which scales what goes into each layer
            kept += (7 * channels + wide) * area + 2 * context * tokens
        forwards = frozen + reading + trained + attention
        backwards = frozen + self._text_learns * reading + 2 * trained + 2 * attention
        for _ in range(depth):
            yield _Part(forwards, backwards, kept, channels * area)


def _text_layer(shape: TextShape, config: TrainConfig) -> _Part:
    """A layer of a text encoder that learns."""
    tokens, width, hidden, rank = config.batch_size * CONTEXT_TOKENS, shape.width, shape.hidden, config.lora_rank
    frozen = 2 * (4 * width**2 + 2 * width * hidden) * tokens
    trained = (4 * _lora(width, width, rank) + 2 * _lora(width, hidden, rank)) * tokens
    attention = 4 * width * CONTEXT_TOKENS * tokens
    # Twice a normalization's input and output, q k v and what came of them; the hidden layer before, in and after its
    # activation.
    kept = (8 * width + 3 * hidden + 6 * rank) * tokens
    if config.dora:
        kept += (5 * width + hidden) * tokens
    return _Part(frozen + trained + attention, frozen + 2 * trained + 2 * attention, kept, width * tokens)


def _lora(into: int, out: int, rank: int) -> int:
    """Operations of a LoRA on one token, or one pixel."""
    return 2 * rank * (into + out)


def memory_needed(
    model: Weightless,
    resolution: tuple[int, int],
    config: TrainConfig,
    precision: Precision,
    with_weights: bool = True,
) -> int:
    """Bytes that a run takes at its fullest moment: a picture being encoded, or a step; ``with_weights``, the base
    model's own as well.

    Raises:
        UserError: no layer of the model would learn.
    """
    shape = model.architecture
    kept = work_on_batch(shape, resolution, config).kept * _bytes(precision.autocast_dtype or torch.float32)
    encoding = _ENCODER_COPIES * shape.vae.channels[0] * math.prod(resolution) * _bytes(torch.float32)
    weights = model.weights * _bytes(precision.weight_dtype) if with_weights else 0
    return int(weights + max(encoding, kept + _adapter_bytes(model, config)))


@dataclass(frozen=True)
class Weightless:
    """A model that takes no memory: how many weights it would have, and the layers that could learn."""

    architecture: Architecture
    weights: int
    targets: tuple[LoraTarget, ...]

    @staticmethod
    @lru_cache(maxsize=2)
    def of(architecture: Architecture) -> Weightless:
        """To be called in a turn of the lender's, as everything that builds modules."""
        unet, _ = build_unet(architecture.unet)
        encoders = [build_text_encoder(shape)[0] for shape in architecture.text_encoders]
        parts = [unet, build_vae(architecture.vae)[0], *encoders]
        targets = lora_targets(unet, encoders, architecture)
        weights = sum(weight.numel() for part in parts for weight in part.parameters())
        return Weightless(architecture, weights, tuple(targets))


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()  # torch 2.0 has no dtype.itemsize


def _adapter_bytes(model: Weightless, config: TrainConfig) -> int:
    """All that learns: fp32 numbers, their gradients and the optimizer's state for them."""
    numbers = 0
    for target, rank, _ in choose(model.targets, config):
        out, *into = weight_shape(target.module)
        numbers += rank * (out + math.prod(into)) * (2 if config.adapter == "loha" else 1)
    return numbers * (8 + _OPTIMIZER_BYTES[config.optimizer] + (4 if config.ema_decay else 0))
