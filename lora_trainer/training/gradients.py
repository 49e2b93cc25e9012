"""Gradients of several processes added up: all of a step's in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_trainer.devices import to_device
from lora_trainer.training.ranks import Ranks

ORDERED_BYTES = 16 * 2**20
"""Where all micro-batches' gradients together are no larger, they are gathered and added in the order of one process:
the sum is then the same to the last bit."""
_ALIGNED = 16
"""Each parameter's gradient begins at a multiple of so many numbers (64 bytes), as torch's own memory does: MKL's dot
product, which Prodigy computes with it, is rounded by where its operands begin."""


class SharedGradients:
    """The gradients of one step.

    A row is ``[gradients, 1 for each parameter that has one, loss]``, flat and fp32. In order, each micro-batch has a
    row of its own, else each process has one.

    accumulation: micro-batches of a step, over all processes. exact: add in order, however large that is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, accumulation: int, exact: bool):
        self._parameters, self._ranks = parameters, ranks
        self._sizes = [-(-parameter.numel() // _ALIGNED) * _ALIGNED for parameter in parameters]
        self._width = sum(self._sizes) + len(self._sizes) + 1
        own = -(-accumulation // ranks.size)
        self._penalty_row = own  # of regularisers, which rank 0 computes
        self.in_order = exact or (own + 1) * ranks.size * self._width * 4 <= ORDERED_BYTES
        self._rows = torch.zeros(own + 1 if self.in_order else 1, self._width, device=parameters[0].device)
        self._sum = torch.empty(0)

    def begin(self) -> None:
        """Forget what an attempt at this step has left."""
        self._rows.zero_()

    @torch.no_grad()
    def take(self, place: int | None, loss: Tensor) -> None:
        """Move the parameters' gradients into the row of a micro-batch. place: its number among this process's; None
        for regularisers, or where there is one row for all."""
        row = self._rows[(self._penalty_row if place is None else place) if self.in_order else 0]
        *pieces, present, total = row.split([*self._sizes, len(self._sizes), 1])
        total.add_(loss)
        grads = [parameter.grad for parameter in self._parameters]
        there = torch.tensor([grad is not None for grad in grads], dtype=row.dtype)
        present.add_(to_device(there, row.device))
        found = [(piece[: grad.numel()], grad.reshape(-1)) for piece, grad in zip(pieces, grads) if grad is not None]
        if found:
            torch._foreach_add_([piece for piece, _ in found], [grad for _, grad in found])
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up what all processes have."""
        if not self.in_order:
            self._ranks.add(self._rows)
            self._sum = self._rows[0]
            return
        of_ranks = self._ranks.collect(self._rows)
        total = torch.zeros_like(self._rows[0])
        for place in range(self._penalty_row):
            for rows in of_ranks:
                total += rows[place]
        self._sum = total.add_(of_ranks[0][self._penalty_row])

    @torch.no_grad()
    def give(self) -> Tensor:
        """Give each parameter its gradient, where any process has one, and return the step's loss."""
        *pieces, present, loss = self._sum.clone().split([*self._sizes, len(self._sizes), 1])
        for parameter, piece, count in zip(self._parameters, pieces, present.tolist()):
            parameter.grad = piece[: parameter.numel()].view_as(parameter) if count else None
        return loss.squeeze(0)
