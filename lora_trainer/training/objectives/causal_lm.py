"""Next-token prediction: cross-entropy over the labelled tokens alone, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_trainer.devices import to_device
from lora_trainer.models.families.causal_lm.model import Head, LanguageModel

CHUNK_NUMBERS = 2**23
"""Logits that exist at once: 32 MiB in fp32."""


@dataclass(frozen=True)
class TokenBatch:
    """Conversations of similar length, filled up at their end.

    tokens: (B, L) int64. labelled: (B, L) bool, the tokens that are learned; never the first, which nothing predicts.
    """

    tokens: Tensor
    labelled: Tensor

    @property
    def count(self) -> int:
        """Labelled tokens."""
        return int(self.labelled.sum())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenBatch:
        return TokenBatch(self.tokens[rows], self.labelled[rows])


@dataclass(frozen=True)
class Inputs:
    """On the device. tokens: (B, L). places: (N,) in the flattened batch, whose next tokens are ``targets`` (N,)."""

    tokens: Tensor
    places: Tensor
    targets: Tensor


class CausalLmObjective:
    """See ``Objective``. Nothing is drawn: the loss of a micro-batch is a function of its tokens."""

    def __init__(self, model: LanguageModel):
        self._model = model

    def draw(self, micro_batch: TokenBatch, generator: torch.Generator) -> TokenBatch:
        return micro_batch

    def inputs(self, drawn: TokenBatch) -> Inputs:
        places = drawn.labelled[:, 1:].nonzero()  # (N, 2): row, and position of the token before
        flat = places[:, 0] * drawn.tokens.shape[1] + places[:, 1]
        targets = drawn.tokens[:, 1:][drawn.labelled[:, 1:]]
        device = self._model.device
        return Inputs(to_device(drawn.tokens, device), to_device(flat, device), to_device(targets, device))

    def loss(self, inputs: Inputs) -> Tensor:
        hidden = self._model.hidden_states(inputs.tokens).flatten(0, 1)  # (B·L, D)
        return cross_entropy(hidden.index_select(0, inputs.places), self._model.head, inputs.targets)

    def fixed_draws(self, micro_batch: TokenBatch, place: float, generator: torch.Generator) -> TokenBatch:
        """For a measurement; there are no noise levels."""
        return micro_batch

    def predict(self, inputs: Inputs) -> Tensor:
        """The hidden states (N, D) from which the labelled tokens are predicted, fp32."""
        return self._model.hidden_states(inputs.tokens).flatten(0, 1).index_select(0, inputs.places).float()

    def addresses(self) -> tuple[int, ...]:
        return self._model.addresses()

    def warnings(self) -> list[str]:
        return []


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """The sum over N tokens of -log p(target), a scalar in fp32 (fp64 for fp64).

    hidden: (N, D). targets: (N,). chunk: how many tokens' logits exist at once.

    The head is frozen, so its gradient is not wanted and that of ``hidden`` can be computed with the logits at hand:
    they never exist for all tokens, in neither pass.
    """
    rows = max(1, CHUNK_NUMBERS // len(head.weight)) if chunk is None else chunk
    return _ChunkedCrossEntropy.apply(hidden, targets, head, rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight = head.weight.to(hidden.dtype)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            logits = torch.nn.functional.linear(part, weight, bias).to(exact)
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(-1, wanted)).sum()
            if grad is None:
                continue
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
            delta = logits.sub_(log_sum).exp_()  # p - 1 at the target, p elsewhere
            delta.scatter_add_(-1, wanted, -torch.ones_like(log_sum))
            if slope is not None:
                delta.mul_(slope)
            torch.mm(delta.to(hidden.dtype), weight, out=grad[start : start + rows])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None, None
