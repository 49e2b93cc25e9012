"""Main memory that a GPU copies from while the CPU goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_trainer.errors import UserError
from lora_trainer.out_of_memory import is_out_of_memory


class PinnedMemory:
    """Hands out pieces of pinned memory.

    torch rounds each tensor that it pins up to a power of two bytes, which is up to twice as much; so several pieces
    share one such tensor.
    """

    def __init__(self) -> None:
        self._arenas: list[Tensor] = []
        self._used: list[int] = []

    @property
    def bytes(self) -> int:
        """That are pinned."""
        return sum(arena.numel() for arena in self._arenas)

    def take(self, size: int) -> Tensor:
        """uint8, (size). Raises UserError where main memory does not suffice."""
        number = next((n for n, arena in enumerate(self._arenas) if self._used[n] + size <= arena.numel()), None)
        if number is None:
            self._arenas.append(_pinned(1 << (2 * size - 1).bit_length()))
            self._used.append(0)
            number = len(self._arenas) - 1
        start, self._used[number] = self._used[number], self._used[number] + size
        return self._arenas[number].narrow(0, start, size)

    def clear(self) -> None:
        """Let go of all of it. torch keeps it for what it pins next; newer releases can give it back."""
        self._arenas, self._used = [], []
        give_back = getattr(torch._C, "_host_emptyCache", None)  # from torch 2.6 on, with CUDA
        if give_back is not None:
            give_back()


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8).pin_memory()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "Main memory does not suffice for the blocks that wait there.",
            field="offload_blocks",
            remedy="Use fewer, or base_precision: nf4.",
        ) from error
