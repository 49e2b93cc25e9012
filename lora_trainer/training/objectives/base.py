"""The protocol of training objectives: how a micro-batch becomes a loss."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sized
from typing import Any, Protocol

import torch
from torch import Tensor


class Drawn(Protocol):
    """A micro-batch together with every random number that its loss needs, all on the CPU.

    count: what the sum of its losses is divided by, such as the number of pictures or of labelled tokens.
    """

    @property
    def count(self) -> int: ...

    def __len__(self) -> int:
        """Samples in the micro-batch."""
        ...

    def __getitem__(self, rows: slice) -> Drawn:
        """Some consecutive samples, with the same draws. The losses of all parts add up to the loss of the whole."""
        ...


class Objective(Protocol):
    """A training objective, from the random draws to the loss.

    ``draw`` is separate so that a micro-batch can be computed again, in smaller parts, with the same draws; ``inputs``
    is separate from ``loss`` so that a CUDA graph of the loss can be replayed on other inputs.
    """

    def draw(self, micro_batch: Any, generator: torch.Generator) -> Drawn:
        """Draw all random numbers for a micro-batch on the CPU. Everything random comes from ``generator``."""
        ...

    def inputs(self, drawn: Any) -> Any:
        """What ``loss`` reads of ``drawn``: a dataclass with tensors on the device. A field with anything else, other
        than None, says that ``loss`` also does something on the CPU that no CUDA graph can repeat.

        A field ``strength`` with a number is what the adapters are multiplied with while the loss and its gradients are
        computed; 1 where there is none."""
        ...

    def loss(self, inputs: Any) -> Tensor:
        """The sum of the losses over a micro-batch, a scalar with gradients; ``drawn.count`` is its divisor."""
        ...

    def addresses(self) -> tuple[int, ...]:
        """Where the frozen weights lie that ``loss`` reads. Other addresses invalidate a CUDA graph."""
        ...

    def warnings(self) -> list[str]:
        """Settings that are accepted but probably not intended, one sentence each."""
        ...


class MicroBatch(Sized, Protocol):
    """The samples of one forward pass, as a source reads them; its objective knows what is inside."""


def drawn_for_comparison() -> list[float]:
    """Numbers that this torch and this Python draw from a fixed seed: another library may draw others, and then makes
    another LoRA of the same settings."""
    return [*torch.randn(4, generator=generator_for(0, "comparison")).tolist(), random.Random("comparison").random()]


def generator_for(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose, step …); the same ones in every process and version."""
    digest = hashlib.sha256(repr((int(seed), *parts)).encode("utf-8")).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") & 0x7FFF_FFFF_FFFF_FFFF)
