"""What one of several processes does in a step in which the others have more to do."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from lora_trainer.out_of_memory import OutOfMemoryError
from lora_trainer.training.gradients import SharedGradients
from lora_trainer.training.memory import MemoryMeasures
from lora_trainer.training.processes import choose_own_device
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.step import TrainingStep
from tests.devices import pretended_gpu
from tests.training.fakes import Run, configuration


class Second(Ranks):
    """The second of two; the first has all of the step, and each of its gradients is 1."""

    rank, size, moved = 1, 2, 0

    def total(self, *numbers):
        return [1.0, 1.0, self.moved]

    def collect(self, flat):
        return [torch.ones_like(flat), flat]

    def first(self, compute):
        return {**compute(), "memory": asdict(MemoryMeasures(None, True, True))}


@pytest.fixture
def step(tmp_path):
    run = Run(configuration(tmp_path))
    objective = run.trainer.train_step.objective
    return TrainingStep(run.config, objective, run.adapters, run.precision, 4, ranks=Second())


def test_the_cpu_does_not_wait_for_each_micro_batchs_gradients():
    with pretended_gpu() as gpu:
        parameters = [torch.nn.Parameter(torch.ones(2, device="cuda")) for _ in range(2)]
        shared = SharedGradients(parameters, Second(), accumulation=2, exact=True)
        loss = parameters[0].sum()
        loss.backward()
        gpu.waits.clear()
        shared.take(0, loss.detach())
        assert gpu.waits == []


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has GradScaler for CUDA only")
def test_a_loss_scale_that_was_just_loaded_serves_a_step_without_a_micro_batch_of_its_own(step):
    step.scaler = torch.amp.GradScaler("cpu")
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 256.0})
    assert step(0, []) is not None and step.scaler.get_scale() == 256.0


def test_memory_that_is_short_for_the_others_gradients_is_said_as_such(step, monkeypatch):
    def collect(flat):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")

    monkeypatch.setattr(step.ranks, "collect", collect)
    with pytest.raises(OutOfMemoryError, match=r"20\.00 MiB\.$"):
        step(0, [])


def test_an_optimizer_moved_like_the_others_keeps_this_process_own_measures(step, monkeypatch):
    monkeypatch.setattr(step.ranks, "moved", 1)
    step.measures.part_size = 1
    step(0, [])
    assert step.measures == MemoryMeasures(part_size=1, gradient_checkpointing=False, optimizer_on_cpu=True)


def test_each_process_of_a_machine_makes_another_gpu_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_own_device("auto") is None, "the settings, which are saved, stay as they are"
    assert chosen == [0, 1]
