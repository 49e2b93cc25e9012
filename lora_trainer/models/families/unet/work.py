"""What a training step of a UNet and its text encoders computes and keeps in memory, part by part."""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.families.unet.architecture import Architecture, TextShape, UNetShape
from lora_trainer.models.family import LatentFormat
from lora_trainer.models.work import WITH_ALL, Learning, Part, lora_work

CONTEXT_TOKENS = 77


def parts(
    architecture: Architecture, latents: LatentFormat, resolution: tuple[int, int], config: TrainConfig
) -> Iterator[Part]:
    """The parts of one batch, whatever layers of the UNet learn."""
    yield from _Walk(architecture.unet, latents, resolution, config).parts()
    if config.text_encoders_learn:
        for shape in architecture.text_encoders:
            yield from [text_layer(shape, config)] * shape.layers


def piece_operations(shape: UNetShape, latents: LatentFormat, resolution: tuple[int, int], level: int) -> float:
    """Operations of one resnet and one transformer block of a level, there and back, on one picture, without LoRAs."""
    walk = _Walk(shape, latents, resolution, TrainConfig(batch_size=1, lora_rank=0, conv_rank=0))
    channels = shape.channels[level]
    *_, block = walk._transformer(channels, 1, level)
    return sum(part.forwards + part.backwards for part in (walk._resnet(channels, channels, level), block))


def pieces(shape: UNetShape, latents: LatentFormat) -> float:
    """Pairs of a resnet and a transformer block in the UNet; whatever is too few of the one counts for half."""
    side = latents.factor * 2 ** len(shape.channels)
    walk = _Walk(shape, latents, (side, side), TrainConfig(batch_size=1))
    return sum(part.inputs is not None for part in walk.parts()) / 2


class _Walk:
    """The parts of a UNet in the order in which they run."""

    def __init__(self, shape: UNetShape, latents: LatentFormat, resolution: tuple[int, int], config: TrainConfig):
        self._shape, self._latent_channels, self._batch = shape, latents.channels, config.batch_size
        self._rank, self._conv_rank = config.lora_rank, config.conv_rank
        self._learning = Learning(config)
        self._text_learns = config.text_encoders_learn
        width, height = latents.size(*resolution)
        levels = range(len(shape.channels))
        self._areas = [self._batch * -(-height // 2**level) * -(-width // 2**level) for level in levels]

    def parts(self) -> Iterator[Part]:
        shape, last = self._shape, len(self._shape.channels) - 1
        before = shape.channels[0]
        yield self._conv(self._latent_channels, before, 0)
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
        yield self._conv(before, self._latent_channels, 0)

    def _layer(self, into: int, out: int, level: int) -> Iterator[Part]:
        yield self._resnet(into, out, level)
        yield from self._transformer(out, self._shape.depths[level], level)

    def _conv(self, into: int, out: int, level: int) -> Part:
        area = self._areas[level]
        frozen, low_rank = 2 * 9 * into * out * area, lora_work(9 * into, out, self._conv_rank) * area
        return Part(*self._learning.passes(frozen, low_rank), self._given(into) * area)

    def _given(self, channels: int) -> int:
        """What a convolution keeps of its input, for each pixel: it needs that to learn only."""
        return channels + self._learning.hidden(self._conv_rank) if self._conv_rank else 0

    def _resnet(self, into: int, out: int, level: int) -> Part:
        area = self._areas[level]
        shortcut = into * out if into != out else 0
        frozen = 2 * (9 * (into + out) * out + shortcut) * area
        low_rank = (lora_work(9 * into, out, self._conv_rank) + lora_work(9 * out, out, self._conv_rank)) * area
        # Twice a normalization, an activation and a convolution.
        kept = 2 * (into + out) + self._given(into) + self._given(out)
        turn = len(self._shape.channels) + level  # see ``recomputable``
        return Part(*self._learning.passes(frozen, low_rank), kept * area, into * area, turn)

    def _transformer(self, channels: int, depth: int, level: int) -> Iterator[Part]:
        if not depth:
            return
        area, tokens, rank = self._areas[level], self._batch * CONTEXT_TOKENS, self._rank
        context, wide = self._shape.context_dim, 4 * channels
        frozen, low_rank = 4 * channels**2 * area, 2 * lora_work(channels, channels, rank) * area
        ends = 3 * channels * area
        yield Part(*self._learning.passes(frozen, low_rank), ends)  # in and out of the transformer

        # q k v and out of the image, q and out of the text; in and out of the feed-forward layer and its gate.
        frozen = 2 * (6 * channels**2 + 3 * channels * wide) * area
        reading = 2 * 2 * context * channels * tokens  # k v of the text, which needs a gradient only if it learns
        low_rank = (
            6 * lora_work(channels, channels, rank)
            + lora_work(channels, 2 * wide, rank)
            + lora_work(wide, channels, rank)
        )
        low_rank = low_rank * area + 2 * lora_work(context, channels, rank) * tokens
        attention = 4 * channels * area * (area // self._batch + CONTEXT_TOKENS)
        # Three times a normalization's input and output, q k v and what came of them, q and what came of the text;
        # both halves of the feed-forward layer and their product.
        kept = (12 * channels + 3 * wide + 10 * self._learning.hidden(rank)) * area + 2 * channels * tokens
        forwards, backwards = self._learning.passes(frozen + reading, low_rank)
        backwards -= 0 if self._text_learns else reading
        for _ in range(depth):
            yield Part(forwards + attention, backwards + 2 * attention, kept, channels * area, level)


def text_layer(shape: TextShape, config: TrainConfig) -> Part:
    """A layer of a text encoder that learns."""
    tokens, width, hidden, rank = config.batch_size * CONTEXT_TOKENS, shape.width, shape.hidden, config.lora_rank
    learning = Learning(config)
    frozen = 2 * (4 * width**2 + 2 * width * hidden) * tokens
    low_rank = (4 * lora_work(width, width, rank) + 2 * lora_work(width, hidden, rank)) * tokens
    attention = 4 * width * CONTEXT_TOKENS * tokens
    # Twice a normalization's input and output, q k v and what came of them; the hidden layer before, in and after its
    # activation.
    kept = (8 * width + 3 * hidden + 6 * learning.hidden(rank)) * tokens
    forwards, backwards = learning.passes(frozen, low_rank)
    return Part(forwards + attention, backwards + 2 * attention, kept, width * tokens, WITH_ALL)
