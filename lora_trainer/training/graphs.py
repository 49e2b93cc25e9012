"""Forward and backward pass of a micro-batch as one CUDA graph.

A step launches thousands of kernels, most of them short: the CPU takes longer to launch them than a fast card takes to
run them. A graph is recorded once for each shape of micro-batch and then launched as a whole. Kernels, their order and
their numbers stay the same.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.devices import free_memory

log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Steps of a shape that are timed before its graph is recorded. The first of all also chooses and loads kernels."""
MIN_GAIN = 0.95
"""A graph that does not bring a step below this share of its time is given up."""
MAX_GRAPHS = 16
"""Shapes that are recorded; any other runs without a graph."""
SPARE_BYTES = 2 * 2**30
"""A graph keeps its activations' memory for itself. It is recorded only where twice that and this much more is free."""

Compute = Callable[[Any, Tensor], Tensor]
"""Inputs of a micro-batch and the divisor (a scalar tensor) -> its detached loss; adds to the parameters' gradients."""


@dataclasses.dataclass
class _Recorded:
    graph: Any
    inputs: Any
    divisor: Tensor
    loss: Tensor


class MicroBatchGraphs:
    """Runs ``compute`` as it is, or replays a recording of it where that is faster.

    While graphs may be recorded, gradients are added up in tensors that keep their place, ``sums``; the parameters get
    them at the end of a step (``finish``).

    parameters: that learn. addresses: says where the frozen weights lie; graphs recorded at others are dropped.
    is_settled: says of a shape whether ``compute`` does the same with it from now on; none is recorded before.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Sequence[nn.Parameter],
        addresses: Callable[[], tuple[int, ...]],
        device: torch.device,
        is_settled: Callable[[Any], bool] = lambda shape: True,
    ):
        self._compute, self._parameters, self._addresses, self._device = compute, parameters, addresses, device
        self._is_settled = is_settled
        self.enabled = device.type == "cuda"
        self.min_gain, self.spare_bytes = MIN_GAIN, SPARE_BYTES
        self._sums: list[Tensor] = []
        self._recorded: dict[Any, _Recorded] = {}
        self._seconds: dict[tuple[Any, bool], list[float]] = {}  # of whole steps, by shapes and with or without graphs
        self._recorded_at: tuple[int, ...] = ()
        self._computed_at: tuple[int, ...] = ()  # without a graph
        self._pool: Any = None
        self._used: list[Any] = []  # shapes of the step in hand
        self._failed = ""  # why a recording failed

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step, which ends by waiting for the device: its time decides whether graphs stay."""
        if not self.enabled:
            yield
            return
        self._used = []
        if not self._sums:
            self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        torch._foreach_zero_(self._sums)
        recorded_before = len(self._recorded)
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if self._failed:
            self.give_up(self._failed)
        elif len(self._recorded) == recorded_before and self._used:  # recording takes longer than a step
            self._judge(seconds)

    def __call__(self, inputs: Any, divisor: Tensor) -> Tensor:
        """The detached loss of a micro-batch, whose gradients are added up."""
        if not self.enabled:
            return self._compute(inputs, divisor)
        shape = shape_of(inputs)
        self._used.append(shape)
        # The weights may have left since, for the text encoders that read this micro-batch's captions, say. They come
        # back in ``compute``, which can be recorded once they stay.
        there = self._addresses()
        if self._recorded and there != self._recorded_at:
            self.drop()
        recorded = self._recorded.get(shape)
        if recorded is None and there == self._computed_at and self._is_due(shape):
            recorded = self._record(shape, inputs, divisor)
        if recorded is None:
            loss = self._compute_and_add(inputs, divisor)
            self._computed_at = self._addresses()
            return loss
        _copy(inputs, recorded.inputs)
        recorded.divisor.copy_(divisor)
        recorded.graph.replay()
        return recorded.loss.clone()

    @property
    def count(self) -> int:
        """Recorded graphs."""
        return len(self._recorded)

    def finish(self) -> None:
        """Give the parameters the gradients of the step."""
        if self.enabled:
            for parameter, total in zip(self._parameters, self._sums):
                parameter.grad = total

    def drop(self) -> None:
        """Give back the memory of all graphs. They are recorded anew when they are due again."""
        self._recorded.clear()
        self._seconds.clear()
        self._pool = None

    def give_up(self, reason: str) -> None:
        """No graphs for the rest of the run. Not to be called between the micro-batches of a step."""
        log.info("CUDA graphs are not used: %s", reason)
        self.drop()
        self.enabled, self._sums = False, []

    # ------------------------------------------------------------------------------------------------------------

    def _is_due(self, shape: Any) -> bool:
        if shape is None or self._failed or len(self._recorded) >= MAX_GRAPHS:
            return False
        return len(self._seconds.get((shape, False), ())) >= EAGER_STEPS

    def _record(self, shape: Any, inputs: Any, divisor: Tensor) -> _Recorded | None:
        if not self._has_room():
            self._failed = "too little memory is free for their activations."
            return None
        static = _map(inputs, torch.clone)
        static_divisor = divisor.clone()
        graph = torch.cuda.CUDAGraph()
        self._recorded_at = self._computed_at
        try:
            # The WebUI's other threads may call CUDA meanwhile; only what this thread does is restricted.
            # On a stream of this device (the default is one of the current device), and back to the one before
            # whatever happens.
            stream = torch.cuda.Stream(self._device)
            before = torch.cuda.current_stream(self._device)
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(before),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                loss = self._compute_and_add(static, static_divisor)
        except RuntimeError as error:  # out of memory too
            self._failed = str(error).splitlines()[0]
            for parameter in self._parameters:
                parameter.grad = None
            return None
        self._pool = self._pool or graph.pool()
        self._recorded[shape] = _Recorded(graph, static, static_divisor, loss)
        return self._recorded[shape]

    def _compute_and_add(self, inputs: Any, divisor: Tensor) -> Tensor:
        loss = self._compute(inputs, divisor)
        pairs = [(total, p.grad) for total, p in zip(self._sums, self._parameters) if p.grad is not None]
        torch._foreach_add_([total for total, _ in pairs], [grad for _, grad in pairs])
        for parameter in self._parameters:
            parameter.grad = None
        return loss

    def _has_room(self) -> bool:
        """Whether the activations of a step, as the last steps had them, fit beside what is there, twice."""
        allocated = torch.cuda.memory_allocated(self._device)
        activations = torch.cuda.max_memory_allocated(self._device) - allocated
        return free_memory(self._device) >= 2 * activations + self.spare_bytes

    def _judge(self, seconds: float) -> None:
        """Take the time of a step; give graphs up where they do not pay."""
        shapes = tuple(self._used)
        if not all(map(self._is_settled, shapes)):
            return
        with_graphs = all(shape in self._recorded for shape in shapes)
        if not with_graphs and any(shape in self._recorded for shape in shapes):
            return  # mixed, which says nothing of either
        for shape in set(shapes):
            times = self._seconds.setdefault((shape, with_graphs), [])
            if len(times) < 2 * EAGER_STEPS:
                times.append(seconds / len(shapes))
            plain = self._seconds.get((shape, False), [])
            if with_graphs and len(times) == EAGER_STEPS and plain:
                gain = statistics.median(times) / statistics.median(plain[1:] or plain)
                if gain > self.min_gain:
                    self.give_up(f"a step takes {gain:.2f} of its time without.")
                    return


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to every tensor in it, through dataclasses and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _map(one, function) for name, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _map(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _leaves(value: Any) -> Iterator[Any]:
    """What dataclasses and mappings hold, in their order."""
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


def shape_of(inputs: Any) -> tuple | None:
    """Shapes and formats, by which a recording or the pace of compiled blocks is found; None for inputs that hold
    something other than tensors."""
    leaves = list(_leaves(inputs))
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tuple(leaf if leaf is None else (tuple(leaf.shape), leaf.dtype) for leaf in leaves)


def _copy(source: Any, target: Any) -> None:
    for new, old in zip(_leaves(source), _leaves(target)):
        if old is not None:
            old.copy_(new, non_blocking=True)
