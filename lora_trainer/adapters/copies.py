"""Copies of the LoRAs' fp32 parameters in the format of the computation, made once a step instead of in every layer.

The optimizer, the state, the average and the file see the parameters alone. While a step computes, the layers use the
copies and the gradients gather there; they are added to the parameters' in fp32 after every backward pass. In the place
of DoRA's lengths there are the factors that follow from them, ``dora_scale / ‖W + ΔW‖``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_trainer.adapters import dora
from lora_trainer.adapters.base import Adapter
from lora_trainer.adapters.joint import Joint
from lora_trainer.adapters.lora import LoraAdapter


class WorkingCopies:
    """The copies of ``adapters``; ``joints`` among them get one tensor of all their downs, and one of all their ups.

    The parameters must keep their memory: what changes them writes into them.
    """

    def __init__(self, adapters: Sequence[Adapter], joints: Sequence[Joint], dtype: torch.dtype):
        self._leaves: dict[LoraAdapter | Joint, list[Tensor]] = {}
        self._parts: list[_Part] = []
        owners = _owners(adapters, joints) if dtype != torch.float32 else []
        self._inverse: Tensor | None = None  # of ``_inverse_norms``, in this step
        if not owners:
            return
        self._dora = dora.groups([owner for owner in owners if isinstance(owner, LoraAdapter)])
        pieces = _arranged(owners, self._dora)
        self._masters = [master for _, _, masters in pieces for master in masters]
        count, device = sum(master.numel() for master in self._masters), self._masters[0].device
        self._flat = torch.empty(count, dtype=dtype, device=device)
        self._read = [master.detach().view(-1) for master in self._masters]
        start = 0
        for owner, shape, masters in pieces:
            part = _Part(masters, shape, start, self._flat)
            start += part.leaf.numel()
            self._parts.append(part)
            self._leaves.setdefault(owner, []).append(part.leaf)
        self._gains_start = count - sum(adapter.shape[1] for group in self._dora for adapter in group)
        self._part_of = [part for part in self._parts for _ in part.masters]
        self._sizes = [master.numel() for master in self._masters]

    @property
    def leaves(self) -> list[Tensor]:
        """All copies."""
        return [part.leaf for part in self._parts]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the layers compute with the copies as the parameters are now; ``gather`` after each backward pass."""
        self._refresh()
        for owner, leaves in self._leaves.items():
            # DoRA's factor is left out where the layer has to find it by itself.
            owner.working = tuple(leaves[: 2 if self._inverse is None else 3])
        try:
            yield
        finally:
            for owner in self._leaves:
                owner.working = ()

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self._parts:
            return
        values, start = torch.cat(self._read), self._gains_start
        self._flat[:start].copy_(values[:start])
        self._inverse = self._inverse_norms(values)
        if self._inverse is not None:
            self._flat[start:].copy_(values[start:].mul_(self._inverse))
        for part in self._parts:
            part.leaf.grad = None

    def _inverse_norms(self, values: Tensor) -> Tensor | None:
        """1 / ‖W + ΔW‖ of all DoRA layers, one behind the other, fp32; None where there are none, or a host keeps
        weights elsewhere until their layer runs. ``values``: of the parameters, laid out as the copies are."""
        adapters = [adapter for group in self._dora for adapter in group]
        if not adapters or any(adapter.layer.weight.device != values.device for adapter in adapters):
            return None
        found, start = [], 0
        for group in self._dora:
            count, down, up = len(group), group[0].lora_down, group[0].lora_up
            ends = start + count * down.numel(), start + count * (down.numel() + up.numel())
            downs = values[start : ends[0]].view(count, len(down), -1)
            ups, low_ups = (flat[ends[0] : ends[1]].view(count, len(up), -1) for flat in (values, self._flat))
            found.append(dora.inverse_norms(group, downs, ups, low_ups))
            start = ends[1]
        return torch.cat(found)

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
        if self._inverse is not None:
            found[self._gains_start :].mul_(self._inverse)
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


_Piece = tuple[LoraAdapter | Joint, Sequence[int], Sequence[nn.Parameter]]
"""Whose it is, its shape, and the parameters that it is a copy of."""


def _arranged(owners: Sequence[LoraAdapter | Joint], dora_groups: Sequence[Sequence[LoraAdapter]]) -> list[_Piece]:
    """In the order in which it lies: of each group with DoRA all downs and all ups, the others', all gains."""
    pieces: list[_Piece] = []
    grouped = [adapter for group in dora_groups for adapter in group]
    for group in dora_groups:
        for which in (0, 1):
            pieces += [(adapter, *adapter.masters[which]) for adapter in group]
    pieces += [(owner, *part) for owner in owners if owner not in grouped for part in owner.masters]
    for adapter in grouped:
        assert adapter.dora_scale is not None
        pieces.append((adapter, tuple(adapter.dora_scale.shape), [adapter.dora_scale]))
    return pieces


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
