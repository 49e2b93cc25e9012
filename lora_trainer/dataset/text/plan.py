"""Which rows are seen together: rows of similar length, so that little is filled up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.config.schema import TrainConfig


@dataclass(frozen=True)
class RowPlan:
    """lengths: of the rows, in tokens. A step sees ``batch_size * accumulation`` rows, the last of an epoch fewer."""

    lengths: tuple[int, ...]
    batch_size: int
    accumulation: int
    repeats: int
    seed: int

    @classmethod
    def from_config(cls, lengths: Sequence[int], config: TrainConfig) -> RowPlan:
        accumulation = config.gradient_accumulation_steps
        return cls(tuple(lengths), config.batch_size, accumulation, config.repeats, config.seed)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) * self.repeats // (self.batch_size * self.accumulation))

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """Of each step its micro-batches, as numbers of rows. Depends on (seed, epoch) alone; every row is seen
        ``repeats`` times.

        The rows of a step depend on how many there are, not on how they are divided into micro-batches.
        """
        shuffled = random.Random(f"{self.seed} rows {epoch}")
        order = list(range(len(self.lengths))) * self.repeats
        shuffled.shuffle(order)
        order.sort(key=lambda row: self.lengths[row])  # stable: rows of one length stay shuffled
        size = self.batch_size * self.accumulation
        # Not always the longest rows are too few for a step.
        first = shuffled.randrange(self.steps_per_epoch) * size if len(order) % size else 0
        rest = len(order) % size
        groups = [order[start : start + size] for start in range(0, first, size)]
        groups += [order[first : first + rest]] if rest else []
        groups += [order[start : start + size] for start in range(first + rest, len(order), size)]
        shuffled.shuffle(groups)
        cuts = range(0, size, self.batch_size)
        return [[group[cut : cut + self.batch_size] for cut in cuts if group[cut:]] for group in groups]
