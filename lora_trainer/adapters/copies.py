"""Copies of the LoRAs' fp32 parameters in the format of the computation, made once a step instead of in every layer.

The optimizer, the state, the average and the file see the parameters alone. While a step computes, the layers use the
copies and the gradients gather there; they are added to the parameters' in fp32 after every backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_trainer.adapters.base import Adapter
from lora_trainer.adapters.joint import Joint
from lora_trainer.adapters.lora import LoraAdapter


class WorkingCopies:
    """The copies of ``adapters``; ``joints`` among them get one tensor of all their downs, and one of all their ups.

    live: whether the copies hold what the parameters hold, and are to be computed with.

    The parameters must keep their memory: what changes them writes into them.
    """

    def __init__(self, adapters: Sequence[Adapter], joints: Sequence[Joint], dtype: torch.dtype):
        self.live = False
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self._parts: list[_Part] = []
        owners = _owners(adapters, joints) if dtype != torch.float32 else []
        if not owners:
            return
        self._masters = [master for owner in owners for _, group in owner.masters for master in group]
        count, device = sum(master.numel() for master in self._masters), self._masters[0].device
        self._flat = torch.empty(count, dtype=dtype, device=device)
        self._read = [master.detach().view(-1) for master in self._masters]
        start = 0
        for owner in owners:
            parts = []
            for shape, group in owner.masters:
                part = _Part(group, shape, start, self._flat)
                start += part.leaf.numel()
                parts.append(part)
            self._parts += parts
            self._leaves[id(owner)] = parts[0].leaf, parts[1].leaf
            owner.copies = self
        self._part_of = [part for part in self._parts for _ in part.masters]
        self._sizes = [master.numel() for master in self._masters]

    def of(self, owner: LoraAdapter | Joint) -> tuple[Tensor, Tensor]:
        """The copies of down and up, or of all downs and all ups."""
        return self._leaves[id(owner)]

    @property
    def leaves(self) -> list[Tensor]:
        """All copies."""
        return [part.leaf for part in self._parts]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the layers compute with the copies as the parameters are now; ``gather`` after each backward pass."""
        self._refresh()
        try:
            yield
        finally:
            self.live = False

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self._parts:
            return
        self._flat.copy_(torch.cat(self._read))
        for part in self._parts:
            part.leaf.grad = None
        self.live = True

    def forget(self) -> None:
        """Let go of the gradients of a backward pass that did not end."""
        for part in self._parts:
            part.leaf.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """Add the copies' gradients to the parameters', in fp32."""
        if not self._parts:
            return
        found = torch.cat([part.taken() for part in self._parts]).float()
        before, added = [], []
        for part, master, grad in zip(self._part_of, self._masters, found.split(self._sizes)):
            if not part.was_used:
                continue
            if master.grad is None:
                master.grad = grad.view(master.shape)
            else:
                before.append(master.grad)
                added.append(grad.view(master.shape))
        if before:
            torch._foreach_add_(before, added)


def _owners(adapters: Sequence[Adapter], joints: Sequence[Joint]) -> list[LoraAdapter | Joint]:
    joined = {adapter for joint in joints for adapter in joint.adapters}
    alone = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter) and adapter not in joined]
    return [*joints, *alone]


class _Part:
    """One copy. masters: the parameters whose values it holds, one behind the other. start: its place in ``flat``."""

    def __init__(self, masters: Sequence[nn.Parameter], shape: Sequence[int], start: int, flat: Tensor):
        self.masters = masters
        piece = flat[start : start + math.prod(shape)].view(*shape)
        self.leaf = piece.detach().requires_grad_(masters[0].requires_grad)
        self.was_used = False

    def taken(self) -> Tensor:
        """The gradient, flat, which is let go of; zeros where there is none."""
        grad, self.leaf.grad = self.leaf.grad, None
        self.was_used = grad is not None
        return torch.zeros_like(self.leaf).view(-1) if grad is None else grad.reshape(-1)
