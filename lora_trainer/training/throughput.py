"""How fast a device trains, tried on a piece of the model instead of on all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lora_trainer.models.base import ModelArchitecture
from lora_trainer.models.families import get_family
from lora_trainer.models.family import Trial
from lora_trainer.processor import Stopwatch
from lora_trainer.training.forecast import Work
from lora_trainer.training.precision import Precision

_SECONDS = 0.2
"""Each number of pictures is tried at least so long."""
_IN_A_ROW = 4
"""Passes that are launched before the CPU waits for a GPU, as it does once in a step."""
_GROWTH = 1.5
"""A pass that takes so much longer with more pictures is limited by computing, not by launching."""
_MOST_PICTURES = 16
_MORE_PICTURES = 4
_LAUNCHING_COUNTS = 0.1
"""A pass of one picture that takes longer, in seconds, is computing."""
_WITH_LORA = 2.0
"""The piece has no LoRAs: a layer with one launches about twice as many kernels."""


@dataclass(frozen=True)
class Speed:
    """Of a device.

    operations: floating-point operations per second, as ``forecast`` counts them.
    launching: seconds that the CPU takes to launch the kernels of one forward and backward pass, with whatever number
        of pictures; a fast GPU waits for it. 0 where the GPU never does.
    overlapping: whether it computes while the next kernels are launched, as a GPU does.
    """

    operations: float
    launching: float = 0.0
    overlapping: bool = True

    def seconds(self, work: Work) -> float:
        """For one forward and backward pass."""
        computing = work.operations / self.operations
        return max(computing, self.launching) if self.overlapping else computing + self.launching


def throughput(architecture: ModelArchitecture, precision: Precision, resolution: tuple[int, int]) -> Speed:
    """The speed of training such a model on pictures of ``resolution`` (width, height).

    A piece of it, with random weights, computes an output and the gradient of its input: on a GPU with more and more
    pictures, until that takes longer, as launching a few takes as long as launching one. Takes a second or two; to be
    called in a turn of the lender's.

    Raises:
        RuntimeError: the device has no memory for it.
    """
    family = get_family(architecture.family)
    trial = family.trial(architecture, resolution, precision.device, precision.weight_dtype)
    each = _seconds(trial, 1)
    if precision.device.type != "cuda":
        return _without_launching(trial, each)
    pictures, longer = 1, each
    while longer < _GROWTH * each and pictures < _MOST_PICTURES:
        try:
            longer = _seconds(trial, 2 * pictures)
        except RuntimeError:  # so many do not fit
            break
        pictures *= 2
    launching = each * trial.pieces if pictures > 2 else 0.0
    return Speed(pictures * trial.operations / longer, launching)


def _without_launching(trial: Trial, each: float) -> Speed:
    """Of a device that computes one kernel after the other. With small pictures most of a pass is what comes with each
    kernel; it stays the same with more pictures."""
    if each > _LAUNCHING_COUNTS:
        return Speed(trial.operations / each)
    more = _seconds(trial, _MORE_PICTURES)
    picture = min(each, max((more - each) / (_MORE_PICTURES - 1), each / _MOST_PICTURES))
    return Speed(trial.operations / picture, _WITH_LORA * (each - picture) * trial.pieces, overlapping=False)


def _seconds(trial: Trial, pictures: int) -> float:
    """That the piece takes for so many pictures."""
    inputs = trial.input.detach().repeat(pictures, *[1] * (trial.input.dim() - 1)).requires_grad_()

    def compute() -> None:
        trial.forward(inputs).float().sum().backward()
        inputs.grad = None

    def wait() -> None:
        """For the device, of whatever kind."""
        inputs.detach().flatten()[:1].cpu()

    compute()  # kernels are chosen and loaded
    wait()
    if inputs.device.type != "cuda":
        return _shortest(compute, wait, inputs.device.type == "cpu")
    times, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        for _ in range(_IN_A_ROW):
            compute()
        wait()
        times += _IN_A_ROW
    return elapsed / times


def _shortest(compute: Callable[[], None], wait: Callable[[], None], on_processor: bool) -> float:
    """Of several passes, without what other programs took of the processor."""
    passes: list[float] = []
    watch, started = Stopwatch(), time.perf_counter()
    while not passes or time.perf_counter() - started < _SECONDS:
        compute()
        wait()
        passes.append(watch.lap(computing=on_processor))
    return min(passes)
