"""How fast a device trains, tried on a piece of the model instead of on all of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lora_trainer.models.base import ModelArchitecture
from lora_trainer.models.families import get_family
from lora_trainer.models.family import Trial
from lora_trainer.training.forecast import Work
from lora_trainer.training.precision import Precision

_SECONDS = 0.2
"""Each number of pictures is tried at least so long."""
_IN_A_ROW = 4
"""Passes that are launched before the CPU waits for a GPU, as it does once in a step."""
_GROWTH = 1.5
"""A pass that takes so much longer with more pictures is limited by computing, not by launching."""
_MOST_PICTURES = 16


@dataclass(frozen=True)
class Speed:
    """Of a device.

    operations: floating-point operations per second, as ``forecast`` counts them.
    launching: seconds that the CPU takes to launch the kernels of one forward and backward pass, with whatever number
        of pictures; a fast GPU waits for it. 0 where the GPU never does.
    """

    operations: float
    launching: float = 0.0

    def seconds(self, work: Work) -> float:
        """For one forward and backward pass."""
        return max(work.operations / self.operations, self.launching)


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
        return Speed(trial.operations / each)
    pictures, longer = 1, each
    while longer < _GROWTH * each and pictures < _MOST_PICTURES:
        try:
            longer = _seconds(trial, 2 * pictures)
        except RuntimeError:  # so many do not fit
            break
        pictures *= 2
    launching = each * trial.pieces if pictures > 2 else 0.0
    return Speed(pictures * trial.operations / longer, launching)


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
    in_a_row = _IN_A_ROW if inputs.device.type == "cuda" else 1
    times, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        for _ in range(in_a_row):
            compute()
        wait()
        times += in_a_row
    return elapsed / times
