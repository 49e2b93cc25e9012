"""Compiled blocks compute what they compute without, and are recorded as CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_trainer.devices import torch_version
from lora_trainer.training.compiling import LEAST_TORCH, TIMED_PASSES
from tests.benchmarks.sides import Work, batch_of, our_training

DEMO = Work("sd1", size="demo", resolution=64, batch_size=2, device="cuda")
STEPS = 2 * TIMED_PASSES + 8

pytestmark = pytest.mark.skipif(torch_version() < LEAST_TORCH, reason="torch compiles each block by itself")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_losses_are_the_same(precision, graphs, bases):
    changes = (("dropout", 0.1), ("learning_rate", 1e-3), ("cuda_graphs", graphs))
    work = dataclasses.replace(DEMO, mixed_precision=precision, changes=changes)
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        with our_training(work, bases) as step:
            model = step.objective.model
            if compiled:
                blocks = model.compilable()
                step.compiled.least_seconds, step.compiled.min_gain = 0.0, 100.0
                step.compiled.use([blocks[0], blocks[-1]])  # a transformer block and a resnet
            step.graphs.min_gain = 100.0
            batch = batch_of(work, model.unet)
            losses[compiled] = [step(number, [batch]) for number in range(STEPS)]
            assert step.compiled.enabled == compiled, "Triton is needed; the log says what failed"
            assert step.graphs.count == (graphs == "auto")
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
