"""Optimizers and learning-rate schedules, each from the library that the field uses for it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_trainer import plugins
from lora_trainer.config.schema import LR_SCHEDULERS, TrainConfig
from lora_trainer.devices import torch_version
from lora_trainer.errors import UserError


@dataclass(frozen=True)
class Library:
    """Where an optimizer comes from, and the defaults that differ from the library's own.

    on_cpu: whether it can compute on the CPU.
    """

    module: str
    name: str
    package: str
    defaults: dict[str, Any] = field(default_factory=dict)
    on_cpu: bool = True


LIBRARIES = {
    "adamw": Library("torch.optim", "AdamW", "torch"),
    "adamw8bit": Library("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", on_cpu=False),
    # What its authors recommend for diffusion models (README of konstmish/prodigy).
    "prodigy": Library(
        "prodigyopt",
        "Prodigy",
        "prodigyopt",
        {"weight_decay": 0.01, "use_bias_correction": True, "safeguard_warmup": True},
    ),
    "lion": Library("lion_pytorch", "Lion", "lion-pytorch"),
    # Its own schedule would take the place of learning_rate and lr_scheduler.
    "adafactor": Library(
        "transformers.optimization",
        "Adafactor",
        "transformers",
        {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    ),
}
_KERNELS = {"fused", "foreach", "capturable"}  # how to compute, not what; they fit the state as it was written
_OURS = {"self", "params", "param_groups", "lr"}  # set by the run, not by optimizer_args


def create_optimizer(config: TrainConfig, param_groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over groups with ``params``, ``lr`` and ``name``.

    Raises:
        UserError: its library is missing (field optimizer), or it does not take optimizer_args as they are.
    """
    library = LIBRARIES.get(config.optimizer)
    if library is None:
        constructor, defaults = plugins.need("optimizer", config.optimizer, "optimizer", LIBRARIES), {}
    else:
        constructor, defaults = _load(config.optimizer, library), library.defaults
    arguments = {**defaults, **_checked_arguments(config, constructor)}
    groups = [dict(group) for group in param_groups]
    if config.optimizer == "adamw":
        arguments = {"fused": _fused_available(groups), **arguments}
    if config.optimizer == "prodigy":
        _use_one_rate(config, groups)
    try:
        return constructor(groups, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{config.optimizer} does not take {config.optimizer_args}: {error}.", field="optimizer_args"
        ) from error


def computes_on_cpu(config: TrainConfig) -> bool:
    """Whether the optimizer is known to compute on the CPU as well; nothing is known of plug-ins."""
    library = LIBRARIES.get(config.optimizer)
    return library is not None and library.on_cpu


def optimizer_warnings(config: TrainConfig) -> list[str]:
    """What is unusual about the optimizer's settings."""
    if config.optimizer != "prodigy" or config.learning_rate >= 0.1:
        return []
    return [f"learning_rate {config.learning_rate:g} scales down what Prodigy finds by itself; 1 is usual."]


def check_optimizer(config: TrainConfig) -> None:
    """Raises what ``create_optimizer`` would raise of the library and of optimizer_args, before there is a model."""
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": config.learning_rate, "name": "unet"}
    create_optimizer(config, [group])


def _load(optimizer: str, library: Library) -> Any:
    try:
        return getattr(importlib.import_module(library.module), library.name)
    # bitsandbytes fails in many ways where there is no fitting CUDA: all mean that it cannot be used here.
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(
            f"{optimizer} needs the package {library.package}, which does not work here ({error}).",
            field="optimizer",
            remedy=f"pip install {library.package}, or use adamw.",
        ) from error


def _checked_arguments(config: TrainConfig, constructor: Any) -> dict[str, Any]:
    known = set(inspect.signature(constructor).parameters) - _OURS
    for name in config.optimizer_args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(known))}."
            raise UserError(f"{config.optimizer} has no argument {name!r}.", field="optimizer_args", remedy=hint)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.optimizer_args.items()}


def _fused_available(groups: Sequence[dict[str, Any]]) -> bool:
    """One kernel for all parameters, where this torch has it: CUDA always, the CPU from 2.4 on."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return devices == {"cuda"} or (devices == {"cpu"} and torch_version() >= (2, 4))


def _use_one_rate(config: TrainConfig, groups: list[dict[str, Any]]) -> None:
    # Prodigy estimates one step size for everything, and refuses groups of different rates.
    rates = {group["lr"] for group in groups}
    of_unet = {group["lr"] for group in groups if not group["name"].startswith("text_encoder")}
    for name, differing in (("block_lr_weights", of_unet), ("text_encoder_lr", rates)):
        if getattr(config, name) is not None and len(differing) > 1:
            message = "Prodigy has one learning rate for everything."
            raise UserError(message, field=name, remedy="Leave it empty.")
    for group in groups:
        group["lr"] = max(of_unet, default=group["lr"])  # the text encoders' is half of it, unless it is given


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from ``state``, with the arguments of this run: torch would bring back those of the run that wrote it.

    Raises ValueError or KeyError when the state belongs to other parameters.
    """
    arguments = set(inspect.signature(type(optimizer).__init__).parameters) - {*_OURS, *_KERNELS}
    ours = [{name: group[name] for name in arguments & set(group)} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, ours):
        group.update(values)


def create_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule over ``total_steps`` optimizer steps, as diffusers and transformers define it, or a
    plug-in."""
    from diffusers.optimization import get_scheduler

    name: str = config.lr_scheduler
    warmup = config.warmup_steps(total_steps)
    if name not in LR_SCHEDULERS:
        factor = plugins.need("scheduler", name, "lr_scheduler", LR_SCHEDULERS)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total_steps, config))
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            num_cycles=config.lr_cycles,
            power=config.lr_power,
        )
    except ValueError as error:  # polynomial ends at 1e-7, below which it cannot begin
        raise UserError(f"{name} cannot start here: {error}.", field="learning_rate") from error


def advance_scheduler(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put a new schedule, and the rates of its optimizer, where they are after ``step`` steps.

    The schedules are functions of the step alone, so this equals having made the steps; and the settings of this run
    count, where a loaded optimizer state would bring back the rates of the run that wrote it.
    """
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, base, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, rates):
        group["initial_lr"], group["lr"] = base, rate
    scheduler._last_lr = rates


def step_scheduler(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """One step, also after an optimizer step that was left out (which torch would warn about)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each parameter group by its name; Prodigy's times its own estimate ``d``."""
    return {
        str(group.get("name", index)): float(group["lr"]) * float(group.get("d", 1.0))
        for index, group in enumerate(optimizer.param_groups)
    }
