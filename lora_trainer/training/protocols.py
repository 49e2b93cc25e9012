"""What a run hands to the training loop: who writes the LoRA, who draws with it, and what belongs to the state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import nn


class Saver(Protocol):
    """Writes the LoRA as the adapters are now and returns its path. Called inside a turn.

    prepare: does what takes long and needs no model; called outside of turns, before each save.
    epoch: counted from 1. kind: "step" on the way, "best" when it is the recommended one so far, "stopped" when the run
    was ended early, "final" at the end.
    """

    def prepare(self) -> None: ...

    def __call__(self, step: int, epoch: int, kind: str) -> Path: ...


class Previewer(Protocol):
    """Draws one picture with the adapters as they are now. Called outside a turn; takes one itself."""

    def draw(self, prompt: str, seed: int, step: int, adapters: nn.Module) -> Image.Image: ...


class Resumable(Protocol):
    """A part of the training state. ``load_state_dict`` is called inside a turn."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
