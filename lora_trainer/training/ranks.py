"""The processes that compute one run together. Most runs are one process, which is what ``ALONE`` stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor

from lora_trainer.models.sharding import Peers
from lora_trainer.training.callbacks import TrainCommands

Value = TypeVar("Value")
Part = TypeVar("Part")


class Ranks:
    """This process among those that compute a run. As it stands here, it is the only one.

    rank: its number, from 0; rank 0 leads: it alone writes and decides. size: how many there are.

    Methods that several processes take part in must be called by all of them, in the same order.
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which micro-batches of a step this process computes."""
        return slice(self.rank, None, self.size)

    def numbered(self, parts: Sequence[Part]) -> Iterator[tuple[int, Part]]:
        """This process's micro-batches with their numbers among those of the whole step."""
        return ((self.rank + place * self.size, part) for place, part in enumerate(parts))

    @property
    def peers(self) -> Peers | None:
        """The processes that can keep a base model together; None where there is only one."""
        return None

    # -- what all do together, in main memory; each waits for the others, however long

    def first(self, compute: Callable[[], Value]) -> Value:
        """What rank 0 computes; the others get its answer."""
        return compute()

    def meet(self, value: Value) -> list[Value]:
        """The values of all processes, when all of them have come here."""
        return [value]

    # -- within a step

    def decide(self, stop: bool) -> bool:
        """Whether rank 0 ends the run before this step."""
        return stop

    def total(self, *numbers: float) -> list[float]:
        """The sums of all processes' numbers."""
        return list(numbers)

    def add(self, flat: Tensor) -> None:
        """Replace ``flat`` by the sum over all processes, on its device."""

    def collect(self, flat: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank."""
        return [flat]

    # -- what the others must know of this one

    def listen(self, commands: TrainCommands) -> None:
        """A stop that any process is asked for reaches ``commands`` of each of them."""

    def guard(self, turn: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
        """``turn``, in which this process is expected to make progress."""
        return turn

    def working(self) -> AbstractContextManager[None]:
        """Inside, progress is expected as in a turn."""
        return nullcontext()

    def expect_progress(self) -> None:
        """From now on a process that makes none inside a turn is taken for one that hangs."""

    def progress(self) -> None:
        """Something was done inside a turn."""

    def unhurried(self, seconds: float | None = None) -> AbstractContextManager[None]:
        """Inside, a turn may take so many seconds longer, or as long as it likes."""
        return nullcontext()

    def ask_to_stop(self) -> None:
        """All processes are to stop and save, as a signal to one of them asks for. Safe in a signal handler."""

    def say(self, text: str) -> None:
        """Tell a person what concerns this process alone."""

    def close(self, error: BaseException | None = None) -> None:
        """Leave the others; with an error, say why."""


ALONE = Ranks()

