"""The weights of a block as one tensor of bytes, so that they move together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_trainer.storage import Packing, pack, packing_of, same_weight

ALIGNMENT = 256
"""Of each weight's first byte."""


class Arrivals:
    """Which of some blocks have all their weights, as they are bound one by one."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self._blocks = blocks
        self._owners = {id(owner): block for block in blocks for owner in block.modules()}
        self.begin_again()

    def begin_again(self) -> None:
        self._missing = {id(block): sum(1 for _ in block.parameters()) for block in self._blocks}

    def completed_by(self, owner: nn.Module) -> nn.Module | None:
        """The block whose last weight was bound by this one, which is ``owner``'s."""
        block = self._owners.get(id(owner))
        if block is None:
            return None
        self._missing[id(block)] -= 1
        return block if self._missing[id(block)] == 0 else None


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its block's bytes."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * torch.empty((), dtype=self.dtype).element_size()

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass
class _Moving:
    """See ``storage.Packing``. Autograd keeps it from the forward pass; the weight has moved by the backward pass."""

    now: Packing

    def shape_of(self, stored: Tensor) -> tuple[int, ...]:
        return self.now.shape_of(stored)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return self.now.unpack(stored, dtype)

    def to(self, device: torch.device) -> Packing:
        return self.now.to(device)


@dataclass(frozen=True)
class BlockWeight:
    """owner, name: the parameter. packing: of a packed one, with the places of its tensors by their fields."""

    owner: nn.Module
    name: str
    place: Place
    packing: _Moving | None
    parts: dict[str, Place]

    def bind(self, flat: Tensor) -> None:
        parameter = same_weight(nn.Parameter(self.place.of(flat), requires_grad=False), self)
        if self.packing is not None:
            parts: dict[str, Any] = {field: place.of(flat) for field, place in self.parts.items()}
            self.packing.now = replace(self.packing.now, **parts)  # type: ignore[type-var]
            pack(parameter, self.packing)
        self.owner._parameters[self.name] = parameter

    @property
    def parameter(self) -> nn.Parameter:
        """As it is bound now."""
        return self.owner._parameters[self.name]  # type: ignore[return-value]


class BlockBytes:
    """``flat``: a block's weights as one tensor of bytes, which they are bound to. memory: gives so many bytes."""

    def __init__(self, module: nn.Module, memory: Callable[[int], Tensor]):
        self.weights: list[BlockWeight] = []
        tensors: list[tuple[Place, Tensor]] = []
        end = 0

        def place(tensor: Tensor) -> Place:
            nonlocal end
            found = Place(-(-end // ALIGNMENT) * ALIGNMENT, tensor.dtype, tensor.shape)
            tensors.append((found, tensor))
            end = found.end
            return found

        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                where, packing = place(parameter.detach()), packing_of(parameter)
                parts = {} if packing is None else {name: place(part) for name, part in _tensors(packing).items()}
                moving = None if packing is None else _Moving(packing)
                self.weights.append(BlockWeight(owner, name, where, moving, parts))
        self.flat = memory(-(-end // ALIGNMENT) * ALIGNMENT)
        for where, tensor in tensors:
            where.of(self.flat).copy_(tensor)
        self.bind(self.flat)

    def bind(self, flat: Tensor) -> None:
        for weight in self.weights:
            weight.bind(flat)


def _tensors(packing: Packing) -> dict[str, Tensor]:
    named = {field.name: getattr(packing, field.name) for field in fields(packing)}  # type: ignore[arg-type]
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
