"""One training step on the card: gradients, number formats, memory layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import gc

import pytest
import torch
from torch import Tensor

from tests.benchmarks.sides import Work, batch_of, our_training

DEMO = Work("sd1", size="demo", resolution=64, batch_size=2, device="cuda", mixed_precision="no")
ADAPTERS = {
    "lora": {},
    "locon": {"conv_rank": 8, "conv_alpha": 4.0},
    "dora": {"dora": True, "alpha": 8.0},
    "loha": {"adapter": "loha", "conv_rank": 4},
    "lokr": {"adapter": "lokr", "conv_rank": 4},
}
DROPOUT = {"dropout": 0.1, "rank_dropout": 0.1}


def gradients(work: Work, folder, changes: dict, prepare=lambda model: None) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step, and the gradient of every tensor that learns, unclipped, fp32 on the CPU."""
    work = dataclasses.replace(work, changes=tuple({**changes, "max_grad_norm": 0.0}.items()))
    found: dict[str, Tensor] = {}
    with our_training(work, folder) as step:
        for name, parameter in step.adapters.named_parameters():
            # Away from zero, where half of the gradients would vanish; the same in every number format.
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data.add_(0.02 * noise if "dora_scale" not in name else 0 * noise)
        prepare(step.objective.model)

        def keep(optimizer, *_) -> None:
            for name, parameter in step.adapters.named_parameters():
                assert parameter.device.type == "cuda"
                if parameter.grad is not None:
                    found[name] = parameter.grad.float().cpu()

        step.optimizer.register_step_pre_hook(keep)
        loss = step(0, [batch_of(work, step.objective.model.unet)])
        assert found.keys() == {name for name, _ in step.adapters.named_parameters()}
    assert loss is not None
    return loss, found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    difference = sum((one[name] - other[name]).square().sum() for name in other)
    return float((difference / sum(value.square().sum() for value in other.values())).sqrt())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_gradient_is_there_and_agrees_with_fp32(adapter, dropout, precision, bases, record_property):
    changes = {**ADAPTERS[adapter], **(DROPOUT if dropout else {})}
    loss, exact = gradients(DEMO, bases, changes)
    low_loss, low = gradients(
        dataclasses.replace(DEMO, mixed_precision=precision, weight_dtype=torch.float32), bases, changes
    )
    assert all(value.abs().max() > 0 for value in exact.values())
    far = distance(low, exact)
    print(f"{adapter} {precision} loss {loss:.5f} {low_loss:.5f} gradients {far:.2e}")
    assert abs(low_loss - loss) <= 2e-2 * loss
    assert far <= (2e-2 if precision == "fp16" else 6e-2)  # bf16 keeps 8 bits of each number, fp16 11


def test_channels_last_convolutions_agree(bases):
    """Hosts started with --opt-channelslast lend such weights."""
    work = dataclasses.replace(DEMO, mixed_precision="fp16", weight_dtype=torch.float16)

    def channels_last(model) -> None:
        for parameter in model.unet.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    _, plain = gradients(work, bases, ADAPTERS["locon"])
    _, other = gradients(work, bases, ADAPTERS["locon"], channels_last)
    assert distance(other, plain) <= 2e-2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_dropout_is_the_same_when_it_is_computed_again(checkpointing, bases):
    plain = gradients(DEMO, bases, DROPOUT)
    again = gradients(dataclasses.replace(DEMO, gradient_checkpointing=checkpointing), bases, DROPOUT)
    assert distance(again[1], plain[1]) <= 1e-4


def test_nothing_is_left_on_the_card(bases):
    with contextlib.suppress(AttributeError):
        torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    gradients(DEMO, bases, {})
    gc.collect()  # a step and its graphs refer to each other
    with contextlib.suppress(AttributeError):
        torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card")
def test_a_second_card_is_the_only_one_that_is_used(bases):
    before = torch.cuda.memory_allocated(0)
    gradients(dataclasses.replace(DEMO, device="cuda:1"), bases, {})
    assert torch.cuda.memory_allocated(0) == before
