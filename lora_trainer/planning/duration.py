"""How long a run takes, part by part, each with a range: training, previews, encoding, loading, saving, and its end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig, parse_prompt

if TYPE_CHECKING:
    from lora_trainer.training.throughput import Speed

Timings = Mapping[str, tuple[float, int]]
"""Of a run that was measured: the seconds of each part, and how many pictures, files … they were for."""

Size = tuple[int, int]

MEASURED = 1.25
"""The same work takes so many times as long, or as short, on another day."""
TRIED = 2.0
"""The same of training that was only tried on a piece of the model."""
_GUESSED = 3.0  # and of what was not even tried
_PREVIEW_STEPS = 20  # of the samplers, where a prompt does not say
_DECODING = 1.2  # a preview takes so many times what its steps take
_ENCODER_OPERATIONS = 4.2e6  # for each pixel, of a VAE whose first level has 128 channels
_READ_BYTES, _WRITTEN_BYTES = 3e8, 1e8  # a second
_LOADING, _SAVING, _ENDING = 5.0, 0.5, 3.0  # seconds at least
_CACHED = ("encoding", "known")  # what an earlier run may have left in the cache
_LEARNING_BYTES = 14  # for each number that learns: the LoRA and the state to go on from


@dataclass(frozen=True)
class Length:
    """How much a run does. visits: pictures that it shows the model, repetitions counted; pictures: different ones."""

    visits: float
    pictures: int
    steps: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Span:
    """Seconds: expected, at least, at most."""

    expected: float
    least: float
    most: float

    @classmethod
    def within(cls, seconds: float, factor: float, *, may_be_saved: bool = False) -> Span:
        """may_be_saved: it is left out where a cache has it all."""
        return cls(seconds, 0.0 if may_be_saved else seconds / factor, seconds * factor)


def saves(config: TrainConfig, length: Length) -> int:
    """How often the LoRA is saved, the last time included."""
    return _due(config, length) + 1


def preview_times(config: TrainConfig, length: Length) -> int:
    """How often all previews are drawn: before the first step, on the way, at the end."""
    if config.preview_steps is None:
        return _due(config, length) + 2
    return (length.steps - 1) // config.preview_steps + 2


def to_come(config: TrainConfig, step: int, length: Length) -> dict[str, int]:
    """How often the LoRA is still to be saved and a preview to be drawn after ``step``, by the part's name; what is due
    at this step included."""
    before = dataclasses.replace(length, steps=max(1, step))
    drawn = preview_times(config, before) - 1 if step else 0  # it counts those at the end as well
    return {
        "saving": saves(config, length) - saves(config, before) + 1,
        "previews": (preview_times(config, length) - drawn) * len(config.preview_prompts),
    }


def _due(config: TrainConfig, length: Length) -> int:
    """Saves on the way: at the multiples of either interval below the last step."""
    last = length.steps - 1
    epochs = config.save_epochs and config.save_epochs * length.steps_per_epoch
    intervals = [interval for interval in (config.save_steps, epochs) if interval]
    both = last // math.lcm(*intervals) if len(intervals) == 2 else 0
    return sum(last // interval for interval in intervals) - both


def training_factor(work: float) -> float:
    """How far off the pace of a run may be that did ``work`` times as much, or as little, on each picture."""
    return MEASURED * 2 ** (abs(math.log2(work)) / 4)


def _drawn(config: TrainConfig, size: Size) -> list[float]:
    """Of each preview prompt: steps times pixels."""
    wanted = [parse_prompt(prompt) for prompt in config.preview_prompts]
    return [
        (one.steps or _PREVIEW_STEPS) * (one.width or size[0]) * (one.height or size[1]) for one in wanted
    ]  # fmt: skip


def measured_parts(
    timings: Timings, before: tuple[TrainConfig, Size], now: tuple[TrainConfig, Size], length: Length
) -> dict[str, Span]:
    """All parts but the training, as far as an earlier run had them. before, now: settings and size of pictures."""
    (old, old_size), (config, size) = before, now
    drawn, drawn_before = sum(_drawn(config, size)), _drawn(old, old_size)
    pixels = math.prod(size) / math.prod(old_size)
    amounts = {"loading": 1.0, "encoding": 2 * length.pictures * pixels, "saving": saves(config, length), "ending": 1.0}
    if config.preserve:
        amounts["known"] = config.preserve_pictures * pixels
    if drawn_before:
        amounts["previews"] = preview_times(config, length) * drawn * len(drawn_before) / sum(drawn_before)
    return {
        name: Span.within(timings[name][0] / timings[name][1] * amount, MEASURED, may_be_saved=name in _CACHED)
        for name, amount in amounts.items()
        if timings.get(name, (0.0, 0))[1]
    }


def forecast_parts(
    architecture: Any, config: TrainConfig, size: Size, length: Length, speed: Speed | None, to_load: float, learns: int
) -> dict[str, Span]:
    """All parts but the training before any run. to_load: bytes of weights. learns: numbers that learn."""
    loading = _LOADING + to_load / _READ_BYTES
    saving = saves(config, length) * (_SAVING + learns * _LEARNING_BYTES / _WRITTEN_BYTES)
    found = {"loading": loading, "saving": saving, "ending": _ENDING}
    if speed is not None:
        drawn = preview_times(config, length) * sum(_drawn(config, size)) / math.prod(size)
        each = _guided_step(architecture, config, size, speed)
        found["previews"] = drawn * _DECODING * each
        if config.preserve and config.preserve_pictures:
            from lora_trainer.training.base_pictures import STEPS

            found["known"] = config.preserve_pictures * STEPS * each
        found["encoding"] = length.pictures * _encoding_operations(architecture, size) / speed.operations
    return {name: Span.within(one, _GUESSED, may_be_saved=name in _CACHED) for name, one in found.items()}


def _guided_step(architecture: Any, config: TrainConfig, size: Size, speed: Speed) -> float:
    """Seconds of one step of a sampler: two pictures forwards, for guidance."""
    from lora_trainer.training.forecast import Work, work_on_batch

    one = dataclasses.replace(config, batch_size=1, gradient_checkpointing=False)
    work = work_on_batch(architecture, size, one)
    return speed.seconds(
        Work(work.operations * 2 / 3, 0)
    )  # of a forward and a backward pass a third is the forward one


def _encoding_operations(architecture: Any, size: Size) -> float:
    vae = getattr(architecture, "vae", None)
    return 0.0 if vae is None else math.prod(size) * _ENCODER_OPERATIONS * (vae.channels[0] / 128) ** 2


def total(parts: Mapping[str, Span]) -> Span:
    return Span(*(sum(getattr(one, name) for one in parts.values()) for name in ("expected", "least", "most")))
