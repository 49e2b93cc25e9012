"""The protocol of workloads: what a run learns from, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.config import TrainConfig
from lora_trainer.models.base import LoraTarget
from lora_trainer.run.outputs import Outputs
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.objectives.base import Objective
from lora_trainer.training.precision import Precision
from lora_trainer.training.protocols import Previewer, Saver
from lora_trainer.training.ranks import ALONE, Ranks
from lora_trainer.training.source import Source, Turn
from lora_trainer.training.validation import ValidationData


@dataclass(frozen=True)
class Work:
    """What the engine trains with.

    objective: the loss of training these adapters.
    targets: finds the layers that adapters can attach to; called inside a turn.
    saver: writes the LoRAs of the run. validation: what is held out of the training, if anything is; the objective is
        a ``Measurable`` then.
    beneath: inside, what is active and frozen beside the base model; entered before adapters are built.
    """

    source: Source
    objective: Callable[[AdapterSet], Objective]
    targets: Callable[[], Sequence[LoraTarget]]
    saver: Callable[[Outputs, AdapterSet, TrainCallbacks], Saver]
    validation: ValidationData | None = None
    beneath: Callable[[], AbstractContextManager[None]] = nullcontext


class Workload(Protocol):
    """The data of a run, read and checked before a model is borrowed, and the form of its results.

    The models that it is given are those of its own lender.
    """

    def placed(self, config: TrainConfig, callbacks: TrainCallbacks) -> TrainConfig:
        """``config`` with what depends on the memory that is free now. Called before the model is borrowed."""
        ...

    def run_key(self, model: Any) -> dict[str, Any]:
        """Facts about the data and the model that determine the result, by name."""
        ...

    def work(self, model: Any, precision: Precision, *, keep_model_parts: bool, ranks: Ranks = ALONE) -> Work:
        """What to train with on a borrowed model.

        keep_model_parts: also what the steps do not need stays in memory, since previews are drawn with it.
        ranks: the processes that share out what is to be encoded.

        Raises:
            UserError: settings that cannot be combined.
        """
        ...

    def previewer(self, model: Any, turn: Turn, precision: Precision) -> Previewer | None:
        """Draws previews with the borrowed model, if it can."""
        ...

    def outputs(self, config: TrainConfig, digest: str) -> Outputs:
        """Where the results lie. digest: of the run key."""
        ...

    def merger(self, model: Any, outputs: Outputs) -> Callable[[], Path] | None:
        """Merges the finished LoRA into the base and returns what it wrote; None when that is not wanted.

        Raises:
            UserError: the finished LoRA could not be merged: better now than after hours.
        """
        ...

    def usage(self, lora: Path) -> tuple[str, ...]:
        """What to do with the LoRA, in sentences."""
        ...


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()
