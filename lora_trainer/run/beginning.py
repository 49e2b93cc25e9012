"""What a run begins with, and everything that would stop it before its model is loaded, told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lora_trainer.adapters.lora_file import LoraFile, read_lora
from lora_trainer.captioning.registry import Sources
from lora_trainer.config import Problems, TrainConfig
from lora_trainer.errors import UserError, concerning
from lora_trainer.models.base import Lender
from lora_trainer.run.workloads import task_of, workload_of
from lora_trainer.training.optim import check_optimizer
from lora_trainer.training.precision import resolve
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.state import named_state


def file_lender(config: TrainConfig, ranks: Ranks = ALONE) -> Lender:
    """The lender of ``base_model`` as a file or folder. ranks: the processes that train on it, which may share it.

    Raises UserError when there is none.
    """
    if not config.base_model:
        raise UserError("is empty.", field="base_model", remedy="Give the path of a .safetensors checkpoint.")
    if not Path(config.base_model).exists():
        message = f"There is no {config.base_model}."
        raise UserError(message, field="base_model", remedy="Give the path of a .safetensors checkpoint.")
    precision = resolve(config.device, config.mixed_precision)
    return workload_of(config).file_lender(config, precision, ranks.peers if config.shard_base else None)


def check_processes(config: TrainConfig, count: int) -> None:
    """Raises UserError for settings that so many processes cannot train with."""
    if config.shard_base and count < 2:
        raise UserError(
            "One process alone has nobody to share the base model with.",
            field="shard_base",
            remedy="Start several with torchrun, name several gpus in the tab, or set shard_base: false.",
        )


def with_work_for_all(config: TrainConfig, count: int) -> TrainConfig:
    """The settings with a micro-batch for each of so many processes in every step."""
    accumulation = max(count, config.gradient_accumulation_steps)
    return dataclasses.replace(config, gradient_accumulation_steps=accumulation)


def check_files(config: TrainConfig) -> LoraFile | None:
    """The LoRA that ``config`` begins with. Raises UserError for one, or a state to resume, that cannot be read."""
    if config.resume not in ("auto", "never"):
        named_state(config.resume)
    with concerning("init_lora"):
        return read_lora(config.init_lora) if config.init_lora else None


def look_at_data(config: TrainConfig, captioners: Sources | None = None) -> None:
    """Raises UserError where a run with these settings has nothing to train on."""
    workload_of(config).look(config, captioners)


def with_all_others(
    found: UserError | None,
    config: TrainConfig,
    lender: Callable[[TrainConfig], Lender] = file_lender,
    look: Callable[[TrainConfig], None] = look_at_data,
) -> UserError | None:
    """``found``, which stops a run, together with what else would: with the base model, the pictures or rows, and the
    files that the settings name. None where nothing does.

    config: the settings, as far as they are right. lender: of the base model. look: raises UserError for the data.
    """
    problems = Problems(found)
    with problems.gathered():
        check_files(config)
    with problems.gathered():
        check_optimizer(config)
    if not problems.concern("base_model"):
        with problems.gathered(), concerning("base_model"):
            lender(config).describe()
    if not problems.concern("train_data_dir") and _task_is_known(config, problems):
        with problems.gathered():
            look(config)
    return problems.together(found)


def _task_is_known(config: TrainConfig, problems: Problems) -> bool:
    """Whether the data are pictures or rows; where the base model decides on it, none that is wrong says so."""
    if config.task != "auto" or not problems.concern("base_model"):
        return True
    return task_of(config) == "image" and not Path(config.train_data_dir).is_file()
