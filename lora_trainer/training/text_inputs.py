"""What the steps on text are fed with: encoded rows, put together batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lora_trainer.config.schema import TrainConfig
from lora_trainer.dataset.text.encoding import EncodedRow
from lora_trainer.dataset.text.plan import RowPlan
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.objectives.causal_lm import TokenBatch
from lora_trainer.training.source import WHOLE, Turn


class RowSource:
    """See ``Source``."""

    sample, size_setting = "row", "max_length"
    blame = "The model is damaged: choose another base_model."

    def __init__(self, config: TrainConfig, rows: Sequence[EncodedRow]):
        self._rows = rows
        self._plan = RowPlan.from_config([len(row) for row in rows], config)
        self._steps = lru_cache(maxsize=2)(self._plan.steps)
        self.steps_per_epoch = self._plan.steps_per_epoch
        self.total_steps = config.max_train_steps or config.epochs * self.steps_per_epoch

    def prepare(self, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        return not commands.stopping

    def prepare_epoch(self, epoch: int, turn: Turn, callbacks: TrainCallbacks, commands: TrainCommands) -> bool:
        return not commands.stopping

    def worth_trying(self) -> bool:
        return True  # rows differ in length

    def trial_batch(self, number: int, turn: Turn, commands: TrainCommands) -> TokenBatch | None:
        batches = [[self._rows[row] for row in rows] for step in self._steps(0) for rows in step]
        batches.sort(key=lambda rows: -len(rows) * max(map(len, rows)))
        return collate(batches[number]) if number < len(batches) else None

    def micro_batches(self, epoch: int, position: int, share: slice = WHOLE) -> list[TokenBatch]:
        return [collate([self._rows[row] for row in rows]) for rows in self._steps(epoch)[position][share]]


def collate(rows: Sequence[EncodedRow]) -> TokenBatch:
    """Rows as one batch, filled up at their end; what is filled up is known by its place, never by a token."""
    longest = max(map(len, rows))

    def filled(values: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *[0] * (longest - len(values))], dtype=dtype)

    return TokenBatch(
        torch.stack([filled(row.tokens, torch.int64) for row in rows]),
        torch.stack([filled(row.learned, torch.bool) for row in rows]),
    )
