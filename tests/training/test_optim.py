"""Optimizers, schedules, devices."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from lora_trainer.config import TrainConfig
from lora_trainer.errors import UserError
from lora_trainer.training import precision
from lora_trainer.training.ema import ExponentialMovingAverage
from lora_trainer.training.optim import (
    LIBRARIES,
    advance_scheduler,
    create_optimizer,
    create_scheduler,
    learning_rates,
    step_scheduler,
)


def groups(*rates: float) -> list[dict]:
    return [
        {"params": [torch.nn.Parameter(torch.ones(3, 2))], "lr": rate, "name": f"group{index}"}
        for index, rate in enumerate(rates)
    ]


def expected(name: str, step: int, total: int, warmup: int, cycles: int, power: float) -> float:
    """The factor on the learning rate, as the field defines each schedule."""
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    progress = (step - warmup) / (total - warmup)
    return {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "cosine_with_restarts": 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1))),
        "polynomial": (1 - progress) ** power,
    }[name]


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_with_restarts", "linear", "polynomial"])
def test_schedules(name, warmup):
    config = TrainConfig(lr_scheduler=name, lr_warmup_steps=warmup, lr_cycles=3, lr_power=2.0, learning_rate=0.1)
    optimizer = create_optimizer(config, groups(0.1, 0.05))
    scheduler = create_scheduler(config, optimizer, 20)
    for step in range(20):
        factor = expected(name, step, 20, warmup, 3, 2.0)
        first, second = learning_rates(optimizer).values()
        assert first == pytest.approx(0.1 * factor, abs=1e-6)
        assert second == pytest.approx(0.05 * factor, abs=1e-6)
        resumed = create_optimizer(config, groups(0.1, 0.05))
        advance_scheduler(create_scheduler(config, resumed, 20), step)
        assert learning_rates(resumed) == learning_rates(optimizer), "to the bit"
        step_scheduler(scheduler)


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_every_optimizer_goes_down_a_hill_or_says_what_to_install(name):
    config = TrainConfig(optimizer=name, learning_rate=1.0 if name == "prodigy" else 0.05)
    try:
        optimizer = create_optimizer(config, groups(config.learning_rate))
    except UserError as error:
        assert error.field == "optimizer" and f"pip install {LIBRARIES[name].package}" in error.remedy
        pytest.skip(str(error))
    (parameter,) = optimizer.param_groups[0]["params"]
    for _ in range(400 if name == "prodigy" else 60):
        (parameter**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameter.abs().max() < 0.9


@pytest.mark.parametrize(("optimizer", "module"), [("lion", "lion_pytorch"), ("prodigy", "prodigyopt")])
def test_a_missing_library_is_named_with_its_command(monkeypatch, optimizer, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        create_optimizer(TrainConfig(optimizer=optimizer), groups(1.0))
    assert error.value.field == "optimizer"
    assert error.value.remedy.startswith(f"pip install {LIBRARIES[optimizer].package}")


def test_optimizer_args_reach_the_optimizer_and_typos_name_the_nearest():
    config = TrainConfig(optimizer_args={"weight_decay": 0.5, "betas": [0.8, 0.9]})
    group = create_optimizer(config, groups(1e-3)).param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.8, 0.9)
    wrong = [({"weight_deca": 1}, "weight_decay"), ({"lr": 1}, ""), ({"betas": [3, 4]}, ""), ({"betas": [0.9]}, "")]
    for arguments, hint in wrong:
        with pytest.raises(UserError) as error:
            create_optimizer(TrainConfig(optimizer_args=arguments), groups(1e-3))
        assert error.value.field == "optimizer_args" and hint in str(error.value)


def test_prodigy_has_one_rate():
    pytest.importorskip("prodigyopt")
    optimizer = create_optimizer(TrainConfig(optimizer="prodigy", learning_rate=1.0), groups(1.0, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert learning_rates(optimizer)["group0"] == pytest.approx(1e-6), "its estimate d counts"
    with pytest.raises(UserError) as error:
        create_optimizer(TrainConfig(optimizer="prodigy", learning_rate=1.0, text_encoder_lr=0.5), groups(1.0, 0.5))
    assert error.value.field == "text_encoder_lr"


def test_prodigy_may_freeze_blocks_beside_a_text_encoder():
    pytest.importorskip("prodigyopt")
    config = TrainConfig(optimizer="prodigy", learning_rate=1.0, block_lr_weights=[0.0] * 12 + [0.5] * 13)
    names = ("unet_block_12", "unet_block_24", "text_encoder")
    made = create_optimizer(config, [{**group, "name": name} for name, group in zip(names, groups(0.5, 0.5, 0.25))])
    assert [group["lr"] for group in made.param_groups] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError) as error:
        create_optimizer(config, [{**group, "name": name} for name, group in zip(names, groups(0.5, 1.0, 0.25))])
    assert error.value.field == "block_lr_weights"


def test_moving_average_follows_its_formula_and_gives_the_weights_back():
    parameter = torch.nn.Parameter(torch.zeros(4))
    average, shadow = ExponentialMovingAverage([parameter], 0.7), torch.zeros(4, dtype=torch.float64)
    for n in range(1, 30):
        with torch.no_grad():
            parameter.add_(torch.randn(4, generator=torch.Generator().manual_seed(n)))
        average.update()
        decay = min(0.7, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * parameter.detach().double()
    trained = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach().double(), shadow, atol=1e-5, rtol=1e-5)
    assert torch.equal(parameter, trained)
    other = ExponentialMovingAverage([torch.nn.Parameter(torch.zeros(4))], 0.7)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.state_dict()["shadow"][0], average.state_dict()["shadow"][0])


def test_the_cpu_computes_in_fp32_unless_told_bf16(monkeypatch):
    cpu = precision.resolve("cpu", "auto")
    assert (cpu.weight_dtype, cpu.mixed_dtype, cpu.name) == (torch.float32, None, "no")
    assert cpu.create_scaler() is None
    monkeypatch.setattr(torch, "__version__", "2.2.0+cpu")
    bf16 = precision.resolve("cpu", "bf16")
    assert bf16.mixed_dtype == torch.bfloat16 and bf16.create_scaler() is None
    assert (cpu.compute_dtype, bf16.compute_dtype) == (torch.float32, torch.bfloat16)


def test_bf16_on_the_cpu_is_refused_where_torch_would_crash(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.2+cu121")
    with pytest.raises(UserError, match="torch 2") as error:
        precision.resolve("cpu", "bf16")
    assert error.value.field == "mixed_precision" and error.value.remedy


@pytest.mark.parametrize(
    ("device", "mixed_precision", "field"),
    [("cpu", "fp16", "mixed_precision"), ("quantum", "auto", "device"), ("cuda:99", "auto", "device"),
     ("meta", "auto", "device"), ("hpu", "auto", "device")],
)
def test_what_the_machine_has_not_is_refused(device, mixed_precision, field):
    with pytest.raises(UserError) as error:
        precision.resolve(device, mixed_precision)
    assert error.value.field == field and error.value.remedy


def test_a_gpu_gets_bf16_where_it_computes_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, name in [((8, 6), "bf16"), ((7, 5), "fp16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert precision.resolve("cuda:0", "auto").name == name  # with its index: none has to be asked for
