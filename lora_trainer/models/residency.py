"""Which parts of a model that is read from files lie on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import is_out_of_memory, release_memory

Value = TypeVar("Value")


class Residency:
    """Keeps every part of a model on the device while memory suffices; else the parts make room for each other.

    Nothing is decided in advance: a part leaves only when memory ran out, and is read again when it is needed.

    bind, unbind: bring a part's weights to the device, and let go of them.
    """

    def __init__(self, bind: Callable[[str], None], unbind: Callable[[str], None]):
        self._bind, self._unbind = bind, unbind
        self._resident: set[str] = set()
        self._held: set[str] = set()
        self._change: Callable[[str], Callable[[], None]] | None = None
        self._undo: dict[str, Callable[[], None]] = {}  # of each part that was changed

    def load(self, part: str) -> None:
        """Bring a part to the device, in the place of the others if need be.

        Raises:
            UserError: the device has not enough memory for it alone.
        """
        if part in self._resident:
            return
        tried = partial(self._try_to_bring, part, self._bind)
        if not tried() and not (self.make_room([part]) and tried()):
            raise UserError(
                f"The GPU's memory does not suffice for the base model's {part.replace('_', ' ')}.",
                field="device",
                remedy="Close other programs that use the GPU, or set device: cpu.",
            )
        self._resident.add(part)

    def hold(self, part: str) -> None:
        """Load a part and never let it leave for another: it learns, so a backward pass reads it again.

        Raises:
            UserError: the device has not enough memory for all parts that are held.
        """
        self._held.add(part)
        self.load(part)

    def run(self, part: str, compute: Callable[[], Value]) -> Value:
        """What ``compute`` returns, with the part on the device.

        Without gradients, it is computed once more when memory ran out and other parts could leave.
        """
        self.load(part)
        try:
            return compute()
        except RuntimeError as error:
            if torch.is_grad_enabled() or not is_out_of_memory(error):
                raise
        # The error is gone here, and with its traceback the tensors that it kept alive.
        self.make_room([part])
        return compute()

    def make_room(self, keep: Sequence[str]) -> bool:
        """Let go of all parts but these and those that are held. Returns whether there were any."""
        leaving = self._resident - self._held - set(keep)
        for part in leaving:
            self._let_go(part)
        release_memory()
        return bool(leaving)

    @contextmanager
    def changed(self, change: Callable[[str], Callable[[], None]]) -> Iterator[None]:
        """Inside, ``change(part)`` is called with every part on the device, and again whenever it comes back; what it
        returns undoes it."""
        self._change = change
        try:
            for part in sorted(self._resident):
                self._try_to_bring(part, lambda part: None)
            yield
        finally:
            undo, self._change, self._undo = self._undo, None, {}
            for restore in undo.values():
                restore()

    def forget(self, part: str) -> None:
        """It was released and is not loaded again."""
        self._resident.discard(part)
        self._held.discard(part)
        self._undo.pop(part, None)

    def _try_to_bring(self, part: str, bind: Callable[[str], None]) -> bool:
        try:
            bind(part)
            if self._change is not None:
                self._undo[part] = self._change(part)
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._let_go(part)
        release_memory()
        return False

    def _let_go(self, part: str) -> None:
        self._undo.pop(part, None)
        self._unbind(part)
        self._resident.discard(part)
