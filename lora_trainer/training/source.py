"""Where the training loop gets its micro-batches from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.base import MicroBatch

Turn = Callable[[], AbstractContextManager[None]]
Argument = TypeVar("Argument")
Value = TypeVar("Value")
WHOLE = slice(None)


class Source(Protocol):
    """The data of a run, as the loop reads it.

    Must be a pure function of (settings, data, epoch, position), so that a resumed run sees the same data.
    """

    sample: str  # what one is called in messages: "picture" or "row"
    size_setting: str  # what to lower where memory does not suffice for one of them
    blame: str  # what is wrong, and what to choose, where not a single loss is finite: a sentence

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        ...

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """Encode what the whole run reads, before its first step. Returns False when it was stopped."""
        ...

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        """Encode what this epoch reads in addition (epochs count from 0). Returns False when it was stopped."""
        ...

    def worth_trying(self) -> bool:
        """Whether a step is tried before ``prepare``: what the first steps read must be encoded first, or the batches
        differ so much in size that memory may suffice for the first ones alone."""
        ...

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> MicroBatch | None:
        """A micro-batch of the first epoch, encoded: 0 is that of the most memory, the others follow. None where there
        are not so many, or when it was stopped."""
        ...

    def micro_batches(self, epoch: int, position: int, share: slice = WHOLE) -> Sequence[MicroBatch]:
        """The micro-batches of one optimizer step; ``position``: steps before it in the epoch; ``share``: which of
        them, where several processes compute a step. Called in a thread, so it must not use the device."""
        ...


def ahead(function: Callable[[Argument], Value], arguments: Iterable[Argument]) -> Generator[Value, None, None]:
    """``map`` whose next value is computed in a thread while the caller works on the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="lora-trainer-input") as pool:
        current = None
        for argument in arguments:
            following = pool.submit(function, argument)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
