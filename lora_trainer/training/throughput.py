"""How fast a device trains, tried on a piece of the model instead of on all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_trainer.models.base import ModelArchitecture
from lora_trainer.models.families import get_family
from lora_trainer.training.forecast import Work
from lora_trainer.training.precision import Precision

log = logging.getLogger(__name__)

_SECONDS = 0.3
"""Tried at least so long."""


@dataclass(frozen=True)
class Speed:
    """Of a device.

    operations: floating-point operations per second, as ``forecast`` counts them.
    launching: seconds that the CPU takes to launch the kernels of one forward and backward pass, with whatever number
        of pictures; a fast GPU waits for it. 0 where computing and launching are the same.
    """

    operations: float
    launching: float = 0.0

    def seconds(self, work: Work, graphs: bool = False) -> float:
        """For one forward and backward pass. graphs: its kernels are launched as one CUDA graph."""
        return max(work.operations / self.operations, 0.0 if graphs else self.launching)


def throughput(architecture: ModelArchitecture, precision: Precision, resolution: tuple[int, int]) -> Speed:
    """The speed of training such a model on pictures of ``resolution`` (width, height).

    A piece of it, with random weights, computes an output and the gradient of its input. Takes less than a second on a
    GPU, some on a CPU; to be called in a turn of the lender's.

    Raises:
        RuntimeError: the device has no memory for it.
    """
    family = get_family(architecture.family)
    trial = family.trial(architecture, resolution, precision.device, precision.compute_dtype)

    def compute() -> None:
        output = trial.forward(trial.input)
        output.float().sum().backward()
        trial.input.grad.sum()
        trial.input.grad = None

    def finish() -> None:
        """Wait for the device, of whatever kind."""
        trial.input.detach().flatten()[:1].cpu()

    compute()  # kernels are chosen and loaded
    finish()
    each = _repeat(compute, finish)
    if precision.device.type != "cuda":
        return Speed(trial.operations / each)
    return Speed(trial.operations / min(each, _without_launching(compute, finish)), each * trial.pieces)


def _repeat(compute: Callable[[], None], finish: Callable[[], None]) -> float:
    """Seconds that it takes, of several in a row."""
    times, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _SECONDS:
        for _ in range(4):
            compute()
        finish()
        times += 4
    return elapsed / times


def _without_launching(compute: Callable[[], None], finish: Callable[[], None]) -> float:
    """Seconds that the GPU takes when it need not wait for the CPU; infinite where that cannot be tried."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            compute()
        graph.replay()
        finish()
    except RuntimeError as error:
        log.info("The device's speed was tried without a CUDA graph: %s", error)
        return float("inf")
    return _repeat(graph.replay, finish)
