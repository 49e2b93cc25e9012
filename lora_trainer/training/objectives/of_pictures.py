"""Which objective an image model is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from lora_trainer.config.schema import TrainConfig
from lora_trainer.models.base import Conditioning, FlowSchedule, LentModel
from lora_trainer.training.objectives.diffusion import DiffusionObjective
from lora_trainer.training.objectives.flow import FlowObjective
from lora_trainer.training.objectives.pictures import PictureObjective


def picture_objective(
    config: TrainConfig,
    model: LentModel,
    encode: Callable[[Sequence[str], slice], Conditioning],
    bare: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> PictureObjective:
    """The one that the model's schedule needs; see ``PictureObjective``."""
    kind = FlowObjective if isinstance(model.schedule, FlowSchedule) else DiffusionObjective
    return kind(config, model, encode, bare)
