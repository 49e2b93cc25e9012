"""Frozen blocks of which each of several processes keeps a part; a block is gathered when it computes.

This is what FSDP does for a base that is larger than a card (https://arxiv.org/abs/2304.11277). FSDP itself has all
processes compute the same passes in the same order; here one may measure or draw while the others wait, some have fewer
micro-batches than others, and a pass is repeated where memory was short. Frozen weights need no more than gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_trainer.models.block_bytes import Arrivals, BlockBytes, BlockWeight
from lora_trainer.storage import dense_weight, pack

WHOLE_BLOCKS = 2
"""So many are on the device at most: the one that is entered, and the one that was left."""


class Peers(Protocol):
    """The processes that have the parts. Each loads the whole model, block by block, and calls ``keep`` then."""

    rank: int
    size: int

    def keep(self, parts: Sequence[Tensor]) -> None:
        """This process's part of each block, bytes of the same number as the others'; empty when it is over."""
        ...

    def gather(self, number: int) -> Tensor:
        """The parts of the block of this number, one behind the other. Any process may ask at any time."""
        ...


class ShardedBlocks:
    """All blocks of a model on ``device``, each with as many bytes of every process.

    Whoever binds a block's weights calls ``take`` afterwards, and whoever computes with one calls ``enter`` before. The
    block that was entered last stays whole. What autograd keeps of a block must be computed anew in the backward pass
    (gradient checkpointing), or all of them would stay. ``dense_weight`` gathers the block of a weight that it is
    asked for.
    """

    def __init__(self, blocks: Sequence[nn.Module], peers: Peers, device: torch.device):
        self._modules, self._peers, self._device = list(blocks), peers, device
        self._numbers = {id(block): number for number, block in enumerate(blocks)}
        self._owners = {id(owner): block for block in blocks for owner in block.modules()}
        self._arrivals = Arrivals(self._modules)
        self._blocks: dict[int, BlockBytes] = {}
        self._parts: dict[int, Tensor] = {}
        self._there: int | None = None

    @property
    def bytes(self) -> int:
        """That this process keeps."""
        return sum(part.numel() for part in self._parts.values())

    def take(self, owner: nn.Module) -> None:
        """A weight of this module was bound. Of a block whose last one it is, this process's part stays."""
        module = self._arrivals.completed_by(owner)
        if module is None:
            return
        number = self._numbers[id(module)]
        block = self._blocks[number] = BlockBytes(module, self._memory)
        self._parts[number] = block.flat.chunk(self._peers.size)[self._peers.rank].clone()
        block.flat = block.flat.to("meta")
        self._take_away(number)
        if len(self._parts) == len(self._modules):
            self._peers.keep([self._parts[number] for number in range(len(self._modules))])

    def _memory(self, size: int) -> Tensor:
        each = -(-size // self._peers.size)
        return torch.empty(each * self._peers.size, dtype=torch.uint8, device=self._device)

    def clear(self) -> None:
        """The weights are let go of; they are taken again when they are bound again."""
        self._peers.keep(())
        self._blocks, self._parts, self._there = {}, {}, None
        self._arrivals.begin_again()

    def enter(self, module: nn.Module) -> None:
        """The block computes next, forwards, or once more for its backward pass."""
        self._gather(self._numbers[id(module)])

    def enter_block_of(self, owner: nn.Module) -> None:
        """The same for the block that this module is in, if it is in one."""
        if (block := self._owners.get(id(owner))) is not None:
            self.enter(block)

    def _gather(self, number: int) -> None:
        if self._there == number:
            return
        if self._there is not None:
            self._take_away(self._there)
            self._there = None
        self._blocks[number].bind(self._peers.gather(number))
        self._there = number

    def _take_away(self, number: int) -> None:
        block = self._blocks[number]
        block.bind(block.flat)
        for weight in block.weights:
            pack(weight.parameter, _Absent(weight, lambda: self._gather(number)))


@dataclass(frozen=True)
class _Absent:
    """See ``storage.Packing``: of a weight that the process has not whole. gather: brings it."""

    weight: BlockWeight
    gather: Callable[[], None]

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        packing = self.weight.packing
        return tuple(stored.shape) if packing is None else packing.shape_of(stored)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        self.gather()
        return dense_weight(self.weight.parameter, dtype)

    def to(self, device: torch.device) -> _Absent:
        return self
