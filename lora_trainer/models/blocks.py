"""How the blocks of a model compute while it is trained: what they keep for the backward pass, and compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

# The model draws no random numbers, and their state cannot be read while a CUDA graph is recorded.
checkpoint = partial(_torch_checkpoint, use_reentrant=False, preserve_rng_state=False)


class BlockForward:
    """The forward of a block whose model is trained.

    anew: compute the block anew in the backward pass instead of keeping what is inside.
    compiled: called in the place of the block's own forward, where there is to be a backward pass.
    """

    def __init__(self, block: nn.Module):
        self.plain, self.anew = block.forward, False
        self.compiled: Callable | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.plain(*inputs, **named)
        forward = self.compiled or self.plain
        return checkpoint(forward, *inputs, **named) if self.anew else forward(*inputs, **named)


def block_forward(block: nn.Module) -> BlockForward:
    """That of ``block``, which has it from now on."""
    forward = vars(block).get("forward")
    if not isinstance(forward, BlockForward):
        forward = block.forward = BlockForward(block)  # type: ignore[assignment]
    return forward
