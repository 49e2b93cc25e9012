"""Which parts of a model that is read from files lie on the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lora_trainer.errors import UserError

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

    def load(self, part: str) -> None:
        """Bring a part to the device, in the place of the others if need be.

        Raises:
            UserError: the device has not enough memory for it alone.
        """
        if part in self._resident:
            return
        if not self._try_to_bind(part) and not (self.make_room([part]) and self._try_to_bind(part)):
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
        except torch.cuda.OutOfMemoryError:
            if torch.is_grad_enabled():
                raise
        # The error is gone here, and with its traceback the tensors that it kept alive.
        self.make_room([part])
        return compute()

    def make_room(self, keep: Sequence[str]) -> bool:
        """Let go of all parts but these and those that are held. Returns whether there were any."""
        leaving = self._resident - self._held - set(keep)
        for part in leaving:
            self._unbind(part)
        self._resident -= leaving
        _free()
        return bool(leaving)

    def forget(self, part: str) -> None:
        """It was released and is not loaded again."""
        self._resident.discard(part)
        self._held.discard(part)

    def _try_to_bind(self, part: str) -> bool:
        try:
            self._bind(part)
            return True
        except torch.cuda.OutOfMemoryError:
            pass
        self._unbind(part)
        _free()
        return False


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
