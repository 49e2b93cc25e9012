"""The work of training as the forecast counts it: parts of a model, and what adapters add to their layers.

Counted are the layers that take the time: convolutions, Linear layers and attention. A frozen layer works twice, for
its output and for the gradient of its input; a LoRA three times, since its own weights get gradients as well, and so
does attention, a product of two activations, and a layer whose weight is changed (LoHa, LoKr). Kept for the backward
pass is what autograd and our own nodes (``adapters.fused``) save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.config.schema import TrainConfig


@dataclass(frozen=True)
class Part:
    """What gradient checkpointing computes anew as a whole, or a layer that it leaves alone.

    forwards, backwards: operations. kept: numbers saved between them. inputs: those of them that remain when it is
    checkpointed; None where it never is. turn: where only a share of the parts is checkpointed, those with the lowest
    come first; ``WITH_ALL`` where it takes the whole share.
    """

    forwards: float
    backwards: float
    kept: float
    inputs: float | None = None
    turn: float = 0


WITH_ALL = math.inf


def recomputed(parts: Sequence[Part], share: float) -> set[int]:
    """Indexes of the parts, in the order in which they compute, that gradient checkpointing of this share computes
    anew. Of those with the same turn the first come first: when they are computed anew, most of what was kept is gone.
    """
    able = [index for index, part in enumerate(parts) if part.inputs is not None]
    if share >= 1:
        return set(able)
    taken = round(share * count_recomputable(parts))
    return set(sorted(able, key=lambda index: parts[index].turn)[:taken])


def count_recomputable(parts: Sequence[Part]) -> int:
    """The parts that a share is a share of."""
    return sum(part.inputs is not None and part.turn < WITH_ALL for part in parts)


class Learning:
    """What an adapter adds to the layers that it learns for."""

    def __init__(self, config: TrainConfig):
        self._changes_weight = config.adapter in ("loha", "lokr")

    def passes(self, frozen: float, low_rank: float) -> tuple[float, float]:
        """Operations forwards and backwards of layers that take ``frozen``; ``low_rank``: those of LoRAs on them, 0
        where nothing learns."""
        if self._changes_weight:
            return frozen, 2 * frozen if low_rank else frozen
        return frozen + low_rank, frozen + 2 * low_rank

    def hidden(self, rank: int) -> int:
        """Numbers that are kept for each token beside what goes in."""
        return 0 if self._changes_weight else rank


def lora_work(into: int, out: int, rank: int) -> int:
    """Operations of a LoRA on one token, or one pixel."""
    return 2 * rank * (into + out)
