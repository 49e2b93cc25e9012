"""What is told before a training against what it takes on the card."""

from __future__ import annotations

import dataclasses
import statistics
import time

import pytest
import torch

from lora_trainer.models.checkpoint import FileLender
from lora_trainer.models.families import meta_model
from lora_trainer.training.forecast import memory_needed, work_on_batch
from lora_trainer.training.throughput import throughput
from tests.benchmarks.sides import Work, batch_of, our_training, write_base

WORKS = {
    "sd1": Work("sd1", device="cuda"),
    "sd1 batch 4": Work("sd1", device="cuda", batch_size=4),
    "sd1 loha": Work("sd1", device="cuda", changes=(("adapter", "loha"),)),
    "sdxl": Work("sdxl", device="cuda", resolution=1024),
    "sdxl half checkpointing": Work("sdxl", device="cuda", resolution=1024, gradient_checkpointing=0.5),
    "sdxl checkpointing": Work("sdxl", device="cuda", resolution=1024, gradient_checkpointing=True),
}


@pytest.mark.parametrize("name", WORKS)
def test_memory_and_seconds_are_foretold(name, bases):
    work = dataclasses.replace(WORKS[name], mixed_precision="fp16")  # the format of the files that other tests use
    size = (work.resolution, work.resolution)
    architecture = FileLender(write_base(bases, work)).architecture()
    with our_training(work, bases) as step:
        config = dataclasses.replace(step.config, batch_size=work.batch_size)
        torch.cuda.reset_peak_memory_stats()
        batch, seconds = batch_of(work, step.objective.model.unet), []
        for number in range(14):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(number, [batch])
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated()
    told = memory_needed(meta_model(architecture), size, config, work.precision)
    speed = throughput(architecture, work.precision, size)
    told_seconds = speed.seconds(work_on_batch(architecture, size, config))
    took = statistics.median(seconds[6:])
    print(
        f"{name}: memory {told / peak:.2f} ({told / 2**30:.2f} of {peak / 2**30:.2f} GiB), "
        f"seconds {told_seconds / took:.2f} ({told_seconds:.3f} of {took:.3f})"
    )
    assert told / peak == pytest.approx(1, abs=0.2)
    assert told_seconds / took == pytest.approx(1, abs=0.2)
