"""What a run can learn from: one module each, found in one table."""

from __future__ import annotations

from typing import Literal

from lora_trainer.config import TrainConfig
from lora_trainer.models.families.causal_lm.folder import is_language_model
from lora_trainer.run.workloads.pairs import Opposites, PairedPictures
from lora_trainer.run.workloads.pictures import Pictures
from lora_trainer.run.workloads.text import Texts
from lora_trainer.run.workloads.words import Words

Task = Literal["image", "words", "pair", "slider", "text"]
_Workload = type[Pictures] | type[Words] | type[PairedPictures] | type[Opposites] | type[Texts]
_WORKLOADS: dict[str, _Workload] = {
    "image": Pictures,
    "words": Words,
    "pair": PairedPictures,
    "slider": Opposites,
    "text": Texts,
}


def task_of(config: TrainConfig) -> Task:
    """The setting ``task``; where that is auto, "text" or "image", as ``base_model`` is."""
    if config.task != "auto":
        return config.task
    return "text" if is_language_model(config.base_model) else "image"


def workload_of(config: TrainConfig) -> _Workload:
    """The class of a run's workload, with ``file_lender``, ``look`` and ``open``."""
    return _WORKLOADS[task_of(config)]
