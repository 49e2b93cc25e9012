"""What a run can learn from: one module each, found in one table."""

from __future__ import annotations

from typing import Literal

from lora_trainer.config import TrainConfig
from lora_trainer.models.families.causal_lm.folder import is_language_model
from lora_trainer.run.workloads.pictures import Pictures
from lora_trainer.run.workloads.text import Texts

_WORKLOADS: dict[str, type[Pictures] | type[Texts]] = {"image": Pictures, "text": Texts}


def task_of(config: TrainConfig) -> Literal["image", "text"]:
    """ "image" or "text": the setting ``task``; where that is auto, what ``base_model`` is."""
    if config.task != "auto":
        return config.task
    return "text" if is_language_model(config.base_model) else "image"


def workload_of(config: TrainConfig) -> type[Pictures] | type[Texts]:
    """The class of a run's workload, with ``file_lender``, ``look`` and ``open``."""
    return _WORKLOADS[task_of(config)]
