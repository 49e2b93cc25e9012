"""What a training step computes and keeps in memory, from the model's architecture alone.

Counted are the layers that take the time: convolutions, Linear layers and attention. A frozen layer works twice, for
its output and for the gradient of its input; a LoRA three times, since its own weights get gradients as well, and so
does attention, a product of two activations, and a layer whose weight is changed (LoHa, LoKr). Kept for the backward
pass is what autograd and our own nodes (``adapters.fused``) save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_trainer.adapters.base import weight_shape
from lora_trainer.adapters.inject import choose, parameter_count
from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.unet.architecture import Architecture, TextShape, UNetShape
from lora_trainer.models.families.unet.binding import build_text_encoder, build_unet, build_vae
from lora_trainer.models.families.unet.targets import lora_targets
from lora_trainer.training.precision import Precision

CONTEXT_TOKENS = 77
_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "lion": 4, "adafactor": 0.25}
"""For each trained number, beside the 4 of itself and the 4 of its gradient. Adafactor's state is a row and a column of
each matrix (measured for rank 16)."""
_ENCODER_COPIES = 5
"""Pictures of the VAE's first width that are there at once while one is encoded (measured)."""
_WEIGHT_COPIES = {"lora": 0, "loha": 4, "lokr": 2}
"""Of the largest layer's weight, in fp32, while its gradient is computed (measured)."""
_CUDA_AUTOCAST = 1.3
"""CUDA's autocast computes normalizations in fp32 and keeps what they were given (measured with the CPU's made to)."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass.

    operations: floating-point operations; a multiplication and an addition count as two.
    kept: numbers in memory at the fullest moment, in the format of the computation.
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
    if config.text_encoders_learn:
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
        self._rank, self._conv_rank = config.lora_rank, config.conv_rank
        self._learning = _Learning(config)
        self._text_learns = config.text_encoders_learn
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
        frozen, low_rank = 2 * 9 * into * out * area, _lora(9 * into, out, self._conv_rank) * area
        return _Part(*self._learning.passes(frozen, low_rank), into * area)

    def _resnet(self, into: int, out: int, level: int) -> _Part:
        area = self._areas[level]
        shortcut = into * out if into != out else 0
        frozen = 2 * (9 * (into + out) * out + shortcut) * area
        low_rank = (_lora(9 * into, out, self._conv_rank) + _lora(9 * out, out, self._conv_rank)) * area
        # Twice a normalization, an activation and a convolution, each of which keeps what it was given.
        return _Part(*self._learning.passes(frozen, low_rank), 3 * (into + out) * area, into * area)

    def _transformer(self, channels: int, depth: int, level: int) -> Iterator[_Part]:
        if not depth:
            return
        area, tokens, rank = self._areas[level], self._batch * CONTEXT_TOKENS, self._rank
        context, wide = self._shape.context_dim, 4 * channels
        frozen, low_rank = 4 * channels**2 * area, 2 * _lora(channels, channels, rank) * area
        ends = (5 if self._learning.scales_input else 3) * channels * area
        yield _Part(*self._learning.passes(frozen, low_rank), ends)  # in and out of the transformer

        # q k v and out of the image, q and out of the text; in and out of the feed-forward layer and its gate.
        frozen = 2 * (6 * channels**2 + 3 * channels * wide) * area
        reading = 2 * 2 * context * channels * tokens  # k v of the text, which needs a gradient only if it learns
        low_rank = 6 * _lora(channels, channels, rank) + _lora(channels, 2 * wide, rank) + _lora(wide, channels, rank)
        low_rank = low_rank * area + 2 * _lora(context, channels, rank) * tokens
        attention = 4 * channels * area * (area // self._batch + CONTEXT_TOKENS)
        # Three times a normalization's input and output, q k v and what came of them, q and what came of the text;
        # both halves of the feed-forward layer, the activated gate and the product.
        kept = (12 * channels + 4 * wide + 10 * self._learning.hidden(rank)) * area + 2 * channels * tokens
        if self._learning.scales_input:
            kept += (7 * channels + wide) * area + 2 * context * tokens
        forwards, backwards = self._learning.passes(frozen + reading, low_rank)
        backwards -= 0 if self._text_learns else reading
        for _ in range(depth):
            yield _Part(forwards + attention, backwards + 2 * attention, kept, channels * area)


class _Learning:
    """What an adapter adds to the layers that it learns for."""

    def __init__(self, config: TrainConfig):
        self._changes_weight = config.adapter in ("loha", "lokr")
        self.scales_input = config.dora and not self._changes_weight

    def passes(self, frozen: float, low_rank: float) -> tuple[float, float]:
        """Operations forwards and backwards of layers that take ``frozen``; ``low_rank``: those of LoRAs on them, 0
        where nothing learns."""
        if self._changes_weight:
            return frozen, 2 * frozen if low_rank else frozen
        return frozen + low_rank, frozen + 2 * low_rank

    def hidden(self, rank: int) -> int:
        """Numbers that are kept for each token beside what goes in."""
        return 0 if self._changes_weight else rank


def _text_layer(shape: TextShape, config: TrainConfig) -> _Part:
    """A layer of a text encoder that learns."""
    tokens, width, hidden, rank = config.batch_size * CONTEXT_TOKENS, shape.width, shape.hidden, config.lora_rank
    learning = _Learning(config)
    frozen = 2 * (4 * width**2 + 2 * width * hidden) * tokens
    low_rank = (4 * _lora(width, width, rank) + 2 * _lora(width, hidden, rank)) * tokens
    attention = 4 * width * CONTEXT_TOKENS * tokens
    # Twice a normalization's input and output, q k v and what came of them; the hidden layer before, in and after its
    # activation.
    kept = (8 * width + 3 * hidden + 6 * learning.hidden(rank)) * tokens
    if learning.scales_input:
        kept += (5 * width + hidden) * tokens
    forwards, backwards = learning.passes(frozen, low_rank)
    return _Part(forwards + attention, backwards + 2 * attention, kept, width * tokens)


def _lora(into: int, out: int, rank: int) -> int:
    """Operations of a LoRA on one token, or one pixel."""
    return 2 * rank * (into + out)


def memory_needed(
    model: Weightless,
    resolution: tuple[int, int],
    config: TrainConfig,
    precision: Precision,
    weights_there: int = 0,
) -> int:
    """Bytes that a run takes at its fullest moment: a picture being encoded, or a step; with the base model's own,
    but for the ``weights_there`` (bytes) that are on the device already.

    Raises:
        UserError: no layer of the model would learn.
    """
    encoding = _ENCODER_COPIES * model.architecture.vae.channels[0] * math.prod(resolution) * _bytes(torch.float32)
    step = _learning_bytes(model, config) + step_bytes(model, resolution, config, precision)
    weights = max(0, model.weights * _bytes(precision.weight_dtype) - weights_there)
    return int(weights + max(encoding, step))


def step_bytes(model: Weightless, resolution: tuple[int, int], config: TrainConfig, precision: Precision) -> float:
    """Bytes that come and go within a step."""
    kept = work_on_batch(model.architecture, resolution, config).kept
    kept *= _bytes(precision.compute_dtype)
    if precision.device.type == "cuda" and precision.autocast_dtype is not None:
        kept *= _CUDA_AUTOCAST
    largest = max(math.prod(weight_shape(target.module)) for target, _, _ in choose(model.targets, config))
    return kept + _WEIGHT_COPIES[config.adapter] * largest * _bytes(torch.float32)


@dataclass(frozen=True)
class Weightless:
    """A model that takes no memory: how many weights it would have, and the layers that could learn."""

    architecture: Architecture
    weights: int
    targets: tuple[LoraTarget, ...]

    @staticmethod
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


def _learning_bytes(model: Weightless, config: TrainConfig) -> float:
    """All that learns: fp32 numbers, their gradients and the optimizer's state for them."""
    per_number = 8 + _OPTIMIZER_BYTES[config.optimizer] + (4 if config.ema_decay else 0)
    return parameter_count(model.targets, config) * per_number
