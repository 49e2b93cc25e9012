"""The protocol of workloads: what a run learns from, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_trainer.adapters.metadata import RunFacts
from lora_trainer.models.base import LentModel, LoraTarget
from lora_trainer.training.loop import Previewer
from lora_trainer.training.objectives.base import Objective
from lora_trainer.training.precision import Precision
from lora_trainer.training.source import Source, Turn


@dataclass(frozen=True)
class Work:
    """What the engine trains with.

    targets: finds the layers that adapters can attach to; called inside a turn.
    facts: what the LoRA's metadata says of the run.
    """

    source: Source
    objective: Objective
    targets: Callable[[], Sequence[LoraTarget]]
    facts: RunFacts


class Workload(Protocol):
    """The data of a run, read and checked before a model is borrowed."""

    def run_key(self, model: LentModel) -> dict[str, Any]:
        """Facts about the data and the model that determine the result, by name."""
        ...

    def work(self, model: LentModel, precision: Precision, *, keep_model_parts: bool) -> Work:
        """What to train with on a borrowed model.

        keep_model_parts: also what the steps do not need stays in memory, since previews are drawn with it.

        Raises:
            UserError: settings that cannot be combined.
        """
        ...

    def previewer(self, model: LentModel, turn: Turn, precision: Precision) -> Previewer:
        """Draws previews with the borrowed model."""
        ...


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()
