"""Memory that is told before a run on rows of text."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lora_trainer.config import TrainConfig
from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.causal_lm.work import MetaLanguageModel
from lora_trainer.planning.text import _memory
from lora_trainer.training.precision import resolve


def test_several_processes_that_shard_the_base_hold_a_part_of_the_blocks_and_two_whole_ones():
    layer = torch.nn.Linear(8, 8, device="meta")
    target = LoraTarget("lora_q_proj", "q_proj", "q_proj", "language_model", "attention", None, layer)
    model = MetaLanguageModel((target,), 1_100_000, in_blocks=1_000_000, blocks=10, width=8, inner=8, vocabulary=8)
    work, precision = SimpleNamespace(longest=8, trained=1), resolve("cpu", "no")

    def memory(**settings):
        return _memory(model, TrainConfig(gradient_checkpointing=True, **settings), precision, work)

    whole, weights = memory(gpus=[0, 1])
    assert weights == 4_400_000 and memory(shard_base=True, gpus=[0]) == (whole, weights)
    assert memory(shard_base=True, gpus=[0, 1]) == (whole - 4 * 300_000, weights), "all are read all the same"
    assert memory(shard_base=True, gpus=[0, 1, 2, 3]) == (whole - 4 * 550_000, weights)
