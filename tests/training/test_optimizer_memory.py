"""The optimizer's state and step on the CPU, where a card has no room for them."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.config import TrainConfig
from lora_trainer.training.memory import (
    MemoryMeasures,
    MemoryRecovery,
    move_optimizer_to_cpu,
    on_cpu,
    parameters_on_cpu,
)
from lora_trainer.training.optim import computes_on_cpu, create_optimizer
from tests.devices import pretended_gpu


def test_parameters_come_back_to_their_own_memory_with_new_values():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    home, optimizer = parameter.data_ptr(), torch.optim.AdamW([parameter], lr=0.1)
    with parameters_on_cpu([parameter]):
        optimizer.step()
    assert parameter.data_ptr() == home and parameter.grad is None and not parameter.equal(torch.ones(3))


def test_moving_the_optimizer_switches_its_kernels_off():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=None)
    optimizer.param_groups[0]["fused"] = True
    move_optimizer_to_cpu(optimizer)
    assert optimizer.param_groups[0]["fused"] is False


def test_a_copy_on_the_cpu_shares_nothing():
    tensor = torch.ones(2)
    copied = on_cpu({"a": [tensor, (1, tensor)], "b": None})
    tensor.zero_()
    assert copied["a"][0].sum() == 2 and copied["a"][1][1].sum() == 2 and copied["b"] is None


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_optimizers_state_leaves_the_card(optimizer):
    with pretended_gpu() as gpu:
        parameter = torch.nn.Parameter(torch.ones(6, 4).to(gpu.device))
        config = TrainConfig(optimizer=optimizer, learning_rate=1e-2)
        made = create_optimizer(config, [{"params": [parameter], "lr": 1e-2, "name": "unet"}])
        parameter.grad = torch.ones_like(parameter)
        made.step()
        before = gpu.allocated
        move_optimizer_to_cpu(made)
        kept = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        assert kept and {value.device.type for value in kept} == {"cpu"} and gpu.allocated < before
        assert parameter.device == gpu.device


def test_where_a_share_of_the_parts_is_computed_anew_all_are_when_memory_is_short():
    shares, warnings = [], []
    recovery = MemoryRecovery(
        MemoryMeasures(), checkpointing=0.5, may_move_optimizer=False, set_gradient_checkpointing=shares.append,
        make_room=lambda: None, on_warning=warnings.append,
    )  # fmt: skip
    recovery.apply()
    assert [recovery.take(1, 1, False) for _ in range(3)] == [True, True, False]
    assert shares == [0.5, 1] and warnings[-1].endswith("gradient checkpointing is on for the rest of the run.")


@pytest.mark.parametrize("optimizer, moves", [("adamw", True), ("adamw8bit", False), ("lion", True), ("mine", False)])
def test_an_optimizer_that_may_not_compute_on_the_cpu_stays(tmp_path, optimizer, moves):
    """bitsandbytes' kernels are for cards, and of a plug-in nothing is known."""
    warnings = []
    recovery = MemoryRecovery(
        MemoryMeasures(part_size=1, gradient_checkpointing=True), checkpointing=True,
        may_move_optimizer=computes_on_cpu(TrainConfig(optimizer=optimizer)),
        set_gradient_checkpointing=lambda on: None, make_room=lambda: None, on_warning=warnings.append,
    )  # fmt: skip
    assert recovery.take(1, 1, False), "memory is freed first, whatever the optimizer"
    assert recovery.take(1, 1, False) == moves == recovery.measures.optimizer_on_cpu
