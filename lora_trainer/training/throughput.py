"""How fast a device trains, tried on a piece of the model instead of on all of it."""

from __future__ import annotations

import time

from lora_trainer.models.base import ModelArchitecture
from lora_trainer.models.families import get_family
from lora_trainer.training.precision import Precision

_SECONDS = 0.3
"""Tried at least so long."""


def throughput(architecture: ModelArchitecture, precision: Precision, resolution: tuple[int, int]) -> float:
    """Floating-point operations per second, as ``forecast`` counts them, of training such a model on pictures of
    ``resolution`` (width, height).

    A piece of it, with random weights, computes an output and the gradient of its input. Takes less than a second on a
    GPU, some on a CPU; to be called in a turn of the lender's.

    Raises:
        RuntimeError: the device has no memory for it.
    """
    family = get_family(architecture.family)
    trial = family.trial(architecture, resolution, precision.device, precision.weight_dtype)

    def compute() -> None:
        with precision.autocast():
            output = trial.forward(trial.input)
        output.float().sum().backward()
        trial.input.grad.sum().item()  # which waits for the device, of whatever kind
        trial.input.grad = None

    compute()  # kernels are chosen and loaded
    times, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        compute()
        times += 1
    return times * trial.operations / elapsed
