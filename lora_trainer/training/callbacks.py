"""What a run reports (``TrainCallbacks``) and which commands it takes (``TrainCommands``, polled between steps)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_trainer.training.validation import Measurement


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    loss: mean over the step's batches; None when the step was skipped because something was not finite.
    lr: of the first parameter group (Prodigy: times its own estimate). seconds: of this step. images: in this step.
    working: seconds of it without waiting for the model, and without what other programs took of the processor.
    steps_per_epoch: 0 where it is not known.
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float | None
    lr: float
    seconds: float
    images: int
    working: float = 0.0
    steps_per_epoch: int = 0


class TrainCallbacks:
    """Override what is of interest. Called in the training thread, so it must return quickly."""

    def on_phase(self, name: str, done: int, total: int) -> None:
        """What the run is doing, and how far it is; total 0 where that is not counted.

        Before the steps: "captioning", "pictures", "model", "trying", "latents", "captions", "known". Around them:
        "measuring", "previews", "hashing", "saving", and "training" (counted in steps) as the steps begin or go on. At
        the end: "merging".
        """

    def on_step(self, report: StepReport) -> None:
        """After every optimizer step."""

    def on_saved(self, path: Path, step: int, kind: str) -> None:
        """A file is in place; kind: "lora" or "state"."""

    def on_preview(self, path: Path, step: int, prompt: str) -> None:
        """A preview picture is in place."""

    def on_measured(self, measurement: Measurement) -> None:
        """Held-out pictures were measured."""

    def on_waiting(self, reason: str, returns: bool = False) -> None:
        """The model is not available; the run continues by itself when it is back.

        returns: ``TrainCommands.switch_back`` brings it back.
        """

    def on_warning(self, text: str) -> None:
        """A message that a person should read; the run continues."""


class TrainCommands:
    """Thread-safe commands to a run.

    resting: what the run waits in while it is paused; a lender that keeps the device for a whole run gives it back
    inside. on_paused: called as the run begins to wait, and again while it does; its device computes nothing then.
    """

    def __init__(self) -> None:
        self.resting: Callable[[], AbstractContextManager[None]] = nullcontext
        self.on_paused: Callable[[], None] = lambda: None
        self._running = threading.Event()
        self._running.set()
        self._stop = threading.Event()
        self._save_before_stop = threading.Event()
        self._save = threading.Event()
        self._preview = threading.Event()
        self._switch_back = threading.Event()

    def pause(self) -> None:
        """Wait after this step, with the device free, until ``resume`` or a stop."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def stop(self) -> None:
        """End after this step; what was saved before stays."""
        self._stop.set()
        self._running.set()

    def stop_and_save(self) -> None:
        """End after this step, with the LoRA and the state saved."""
        self._save_before_stop.set()
        self.stop()

    def save_now(self) -> None:
        """Save the LoRA and the state after this step."""
        self._save.set()

    def preview_now(self) -> None:
        """Draw the previews after this step."""
        self._preview.set()

    def switch_back(self) -> None:
        """Where the model is away: have the host choose again what it had chosen when the run began."""
        self._switch_back.set()

    # -- for the run

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def saves_before_stop(self) -> bool:
        return self._save_before_stop.is_set()

    def wait_while_paused(self, timeout: float | None = None) -> None:
        """Return when ``resume`` or a stop is said, or after ``timeout`` seconds. Called by the run, between turns."""
        if self.paused:
            with self.resting():
                self.on_paused()
                self._running.wait(timeout)

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        return _take(self._save)

    def take_preview(self) -> bool:
        """Whether previews were asked for since the last call."""
        return _take(self._preview)

    def take_switch_back(self) -> bool:
        """Whether switching back was asked for since the last call."""
        return _take(self._switch_back)


def _take(event: threading.Event) -> bool:
    wanted = event.is_set()
    event.clear()
    return wanted
