"""Frozen blocks that wait in main memory and are copied to the GPU when they compute, the next one ahead of its time.

They never change, so nothing is copied back. Two buffers on the device are enough: while a block computes out of the
one, the other is filled by a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_trainer.models.block_bytes import Arrivals, BlockBytes
from lora_trainer.models.pinned import PinnedMemory

BUFFERS = 2


def offloaded(blocks: int, count: int) -> list[int]:
    """Which ``count`` of so many blocks wait in main memory: evenly spread, so that the others compute meanwhile."""
    count = min(count, blocks)
    return [(2 * number + 1) * blocks // (2 * count) for number in range(count)]


class _Buffer:
    """Memory on the device for one block. holds: its number, or None. loaded: its copy is over."""

    def __init__(self, size: int, device: torch.device):
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.loaded = torch.cuda.Event()


class BlockOffload:
    """Of the blocks of a model on ``device``, a CUDA one, in the order in which they compute.

    moved: bytes that were copied to the device. Whoever binds a block's weights calls ``take`` afterwards, and whoever
    computes with one calls ``enter`` before. What autograd keeps of a block must be computed anew in the backward pass
    (gradient checkpointing): its weights are elsewhere by then.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device):
        self.device, self.moved = device, 0
        self._modules = [blocks[index] for index in offloaded(len(blocks), count)]
        self._numbers = {id(module): number for number, module in enumerate(self._modules)}
        self._arrivals = Arrivals(self._modules)
        self._blocks: dict[int, BlockBytes] = {}
        self._memory = PinnedMemory()
        self._buffers: list[_Buffer] = []
        self._last = -1
        self._stream = torch.cuda.Stream(device)

    @property
    def resident(self) -> list[int]:
        """The numbers of the blocks whose weights are on the device, or on their way."""
        return sorted(buffer.holds for buffer in self._buffers if buffer.holds is not None)

    @property
    def waiting_bytes(self) -> int:
        """Of main memory, which are pinned."""
        return self._memory.bytes

    def take(self, owner: nn.Module) -> None:
        """A weight of this module was bound. The last one of a block takes the block to main memory."""
        module = self._arrivals.completed_by(owner)
        if module is None:
            return
        self._blocks[self._numbers[id(module)]] = BlockBytes(module, self._memory.take)
        if len(self._blocks) == len(self._modules) and not self._buffers:
            size = max(block.flat.numel() for block in self._blocks.values())
            self._buffers = [_Buffer(size, self.device) for _ in range(min(BUFFERS, len(self._modules)))]

    def clear(self) -> None:
        """The weights are let go of; they are taken again when they are bound again."""
        if self._buffers:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._blocks, self._buffers, self._last = {}, [], -1
        self._memory.clear()
        self._arrivals.begin_again()

    def enter(self, module: nn.Module) -> None:
        """The block computes next, forwards, or once more for its backward pass."""
        number = self._numbers.get(id(module))
        if number is None:
            return
        buffer = self._holding(number) or self._load(number, self._buffer_beside(self._last))
        torch.cuda.current_stream(self.device).wait_event(buffer.loaded)
        self._blocks[number].bind(buffer.flat)
        ahead = self._next(number)
        self._last = number
        if self._holding(ahead) is None:
            self._load(ahead, self._buffer_beside(number))

    def _next(self, number: int) -> int:
        """The passes go up and down; one without gradients goes up again from the beginning."""
        last = len(self._modules) - 1
        if number == last:
            return max(0, last - 1) if torch.is_grad_enabled() else 0
        return number + 1 if number >= self._last or number == 0 else number - 1

    def _holding(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.holds == number), None)

    def _buffer_beside(self, number: int) -> _Buffer:
        return next((buffer for buffer in self._buffers if buffer.holds != number), self._buffers[0])

    def _load(self, number: int, buffer: _Buffer) -> _Buffer:
        """Begin to copy a block. What was computed out of the buffer so far is over before."""
        if buffer.holds is not None:
            gone = self._blocks[buffer.holds]
            gone.bind(gone.flat)
        block = self._blocks[number]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            buffer.flat[: block.flat.numel()].copy_(block.flat, non_blocking=True)
        buffer.loaded.record(self._stream)
        buffer.holds = number
        self.moved += block.flat.numel()
        return buffer

