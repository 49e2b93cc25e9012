"""Blocks of the model compiled by ``torch.compile``, where it is seen to pay.

Blocks of one kind and width share what is compiled for a shape of micro-batch: an SDXL has seventy transformer blocks,
of two widths. Compiled, kernels are fewer and their sums are added in another order: a result differs from the plain
one within rounding.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError
from lora_trainer.models.blocks import BlockForward, block_forward
from lora_trainer.out_of_memory import first_line, is_out_of_memory, release_memory
from lora_trainer.training.graphs import Compute, shape_of

log = logging.getLogger(__name__)

LEAST_TORCH = (2, 5)
"""Before, each block would be compiled by itself, which takes many times as long."""
BACKEND = "inductor"
TIMED_PASSES = 3
"""Micro-batches of a shape that are timed, plain and then compiled. The first one of all also loads kernels."""
LEAST_SECONDS = 600
"""Compiling takes minutes: a shape with less to compute until the end of the run is not compiled."""
MIN_GAIN = 0.95
"""Blocks that do not bring a micro-batch below this share of its time are not used compiled."""
MAX_SHAPES = 4
"""That are compiled; any other is computed plain."""
MOST_VARIANTS = 64
"""Of a block's code, by the shapes that it meets; torch.compile takes eight where it is told nothing."""
LARGEST_DIFFERENCE, LARGEST_DIFFERENCE_LOW = 1e-3, 0.1
"""Between the gradients of a compiled and a plain pass, relative to their length: in fp32, and in fp16 or bf16."""


class CompilingFailedError(Exception):
    """A compiled pass did not come to its end. From now on all passes are plain; the step is to be done again."""


@dataclasses.dataclass
class _Pace:
    """Of one shape. seen: micro-batches. plain, compiled: seconds of those that were timed. cost: of compiling, in
    seconds. wins: None while open."""

    seen: int = 0
    plain: list[float] = dataclasses.field(default_factory=list)
    compiled: list[float] = dataclasses.field(default_factory=list)
    cost: float = 0.0
    tried: bool = False
    wins: bool | None = None


class CompiledBlocks:
    """Runs ``compute`` with the model's blocks as they are, or compiled.

    The first compiled pass of a shape also has to give the gradients of the plain one.

    parameters: that learn. dtype: of the computation. say: is told what is used or not, and why.
    """

    def __init__(self, compute: Compute, parameters: Sequence[nn.Parameter], device: torch.device, dtype: torch.dtype):
        self._compute, self._parameters, self._device = compute, parameters, device
        self._largest_difference = LARGEST_DIFFERENCE if dtype == torch.float32 else LARGEST_DIFFERENCE_LOW
        self._blocks: list[BlockForward] = []
        self._paces: dict[Any, _Pace] = {}
        self._gain = 0.0  # share of its time that a compiled micro-batch takes, as far as that is known
        self._on = False
        self._steps_left, self._steps = 0, 0
        self.least_seconds, self.min_gain = float(LEAST_SECONDS), MIN_GAIN
        self.say: Callable[[str], None] = log.info

    @property
    def enabled(self) -> bool:
        return bool(self._blocks)

    def use(self, blocks: Sequence[nn.Module]) -> None:
        """Compile these, once it pays."""
        if torch_version() < LEAST_TORCH:
            self.leave(f"torch.compile is not used: torch {torch.__version__} would compile each block by itself.")
            return
        functions: dict[Any, Callable] = {}
        for block in blocks:
            kind = type(block), tuple(tuple(one.shape) for one in block.parameters())
            if kind not in functions:
                functions[kind] = _own_code(type(block).forward)
            forward = block_forward(block)
            forward.compiled = self._switch(forward.plain, _compiled(types.MethodType(functions[kind], block)))
            self._blocks.append(forward)

    def begin_step(self, steps_left: int) -> None:
        """To be called before each optimizer step. steps_left: until the end of the run, with this one."""
        self._steps_left = steps_left
        self._steps += 1

    def __call__(self, inputs: Any, divisor: Tensor) -> Tensor:
        """The detached loss of a micro-batch, whose gradients are added to the parameters'.

        Raises:
            CompilingFailedError: the gradients are half done.
        """
        if not self.enabled:
            return self._compute(inputs, divisor)
        shape = shape_of(inputs)
        if shape is None:
            self.leave("torch.compile is not used: the text encoders learn, or the strength of the LoRA changes.")
            return self._compute(inputs, divisor)
        pace = self._paces.setdefault(shape, _Pace())
        pace.seen += 1
        if pace.wins is None:
            if len(pace.plain) < TIMED_PASSES:
                return self._timed(pace.plain, inputs, divisor)
            if not pace.tried:
                return self._try(pace, inputs, divisor) if self._may_pay(pace) else self._compute(inputs, divisor)
            loss = self._timed(pace.compiled, inputs, divisor, on=True)
            if len(pace.compiled) == TIMED_PASSES:
                self._judge(pace)
            return loss
        return self._run(inputs, divisor, on=pace.wins)

    def is_settled(self, shape: Any) -> bool:
        """Whether it is known how micro-batches of this shape are computed from now on."""
        if not self.enabled:
            return True
        pace = self._paces.get(shape, _Pace())
        stays_plain = len(pace.plain) == TIMED_PASSES and not pace.tried and not self._may_pay(pace)
        return pace.wins is not None or stays_plain

    def leave(self, why: str) -> None:
        """Nothing compiled for the rest of the run. why: a sentence, which is said."""
        self.say(why)
        for forward in self._blocks:
            forward.compiled = None
        self._blocks.clear()
        self._paces.clear()

    # ------------------------------------------------------------------------------------------------------------

    def _switch(self, plain: Callable, compiled: Callable) -> Callable:
        def run(*inputs: Any, **named: Any) -> Any:
            return compiled(*inputs, **named) if self._on else plain(*inputs, **named)

        return run

    def _run(self, inputs: Any, divisor: Tensor, on: bool) -> Tensor:
        if not on:
            return self._compute(inputs, divisor)
        self._on = True
        try:
            with torch._dynamo.config.patch(cache_size_limit=MOST_VARIANTS):
                return self._compute(inputs, divisor)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, UserError) or self._is_recorded():
                raise
            reason = first_line(getattr(error, "inner_exception", error))  # that of the compiler
        finally:
            self._on = False
        self.leave(f"torch.compile is not used: {reason}")
        raise CompilingFailedError(reason)

    def _is_recorded(self) -> bool:
        """Whether a CUDA graph is made of the pass: where that fails, the graph is at fault."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _timed(self, seconds: list[float], inputs: Any, divisor: Tensor, on: bool = False) -> Tensor:
        self._wait()
        started = time.perf_counter()
        loss = self._run(inputs, divisor, on)
        self._wait()
        seconds.append(time.perf_counter() - started)
        return loss

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _may_pay(self, pace: _Pace) -> bool:
        """Whether what a compiled pass may save until the end of the run is more than what compiling costs."""
        if sum(other.tried for other in self._paces.values()) >= MAX_SHAPES:
            return False
        seconds_left = statistics.median(pace.plain) * self._steps_left * pace.seen / max(1, self._steps)
        cost = max(other.cost for other in self._paces.values())
        return seconds_left * (1 - self._gain) >= cost if cost else seconds_left >= self.least_seconds

    def _try(self, pace: _Pace, inputs: Any, divisor: Tensor) -> Tensor:
        """A plain pass, which counts, and a compiled one, which has to give the same gradients."""
        before = self._take()
        loss = self._compute(inputs, divisor)
        plain = self._take()
        started, difference, why = time.perf_counter(), None, ""
        try:
            self._run(inputs, divisor, on=True)
            difference = _difference(self._take(), plain)
        except CompilingFailedError:
            pass  # and is given up
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = "torch.compile is not used: too little memory is free."
        self._take()
        self._put(before, plain)
        pace.cost += time.perf_counter() - started
        if difference is not None and not difference <= self._largest_difference:  # or NaN
            why = (
                "torch.compile is not used: the gradients of a compiled pass differ by"
                f" {difference:.2g} of their length."
            )
        if why:
            self.leave(why)
            release_memory()
        pace.tried = difference is not None  # else again, with gradients that are finite
        return loss

    def _take(self) -> list[Tensor | None]:
        """The gradients, which the parameters have no longer."""
        grads = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return grads

    def _put(self, before: Sequence[Tensor | None], added: Sequence[Tensor | None]) -> None:
        for parameter, old, new in zip(self._parameters, before, added):
            parameter.grad = new if old is None else old if new is None else old.add_(new)

    def _judge(self, pace: _Pace) -> None:
        gain = statistics.median(pace.compiled) / statistics.median(pace.plain[1:])
        pace.wins = gain <= self.min_gain
        if pace.wins:
            self._gain = max(self._gain, gain)
            self.say(f"Compiled blocks: a micro-batch takes {gain:.2f} of its time; compiling took {pace.cost:.0f} s.")
        elif not any(other.wins for other in self._paces.values()):
            self.leave(f"torch.compile is not used: a compiled micro-batch takes {gain:.2f} of its time.")


def _own_code(function: Callable) -> Callable:
    """The same function, for torch.compile another one: it keeps what it compiles by the code."""
    code, names = function.__code__, function.__globals__
    copied = types.FunctionType(code.replace(), names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, backend=BACKEND, fullgraph=True, dynamic=False)


def _difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float | None:
    """Length of the difference of two gradients, relative to that of the second; None where that is not finite or 0.

    One that only one of the two has counts as all different.
    """
    if any((one is None) != (other is None) for one, other in zip(found, expected)):
        return math.inf
    pairs = [(one, other) for one, other in zip(found, expected) if one is not None and other is not None]
    squares = [torch.stack([(one - other).square().sum(), other.square().sum()]) for one, other in pairs]
    apart, length = torch.stack(squares).sum(0).sqrt().tolist()
    return apart / length if 0 < length < math.inf else None
