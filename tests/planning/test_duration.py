"""How often is saved and drawn in a run."""

from __future__ import annotations

import pytest

from lora_trainer.config import TrainConfig
from lora_trainer.planning.duration import Length, preview_times, saves


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_steps": 4},
        {"save_epochs": 2},
        {"save_steps": 4, "save_epochs": 2},
        {"save_steps": 100},
        {"save_steps": 4, "preview_steps": 5},
        {"preview_steps": 24},
    ],
)
def test_counts_are_those_of_the_loop(settings):
    config, length = TrainConfig(**settings), Length(0, 0, 24, 3)

    def due(step, name, factor=1):
        every = getattr(config, name)
        return every is not None and step % (every * factor) == 0

    on_the_way = [step for step in range(1, 24) if due(step, "save_steps") or due(step, "save_epochs", 3)]
    drawn = [step for step in range(1, 24) if due(step, "preview_steps")] if config.preview_steps else on_the_way
    assert saves(config, length) == len(on_the_way) + 1
    assert preview_times(config, length) == len(drawn) + 2
