"""A job as the queue knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.errors import Problem, UserError

WAITING_TO_START = ("queued",)
ACTIVE = ("running", "paused", "waiting", "stopping")
OVER = ("finished", "stopped", "failed", "interrupted")
STATUSES = (*WAITING_TO_START, *ACTIVE, *OVER)

_PASSING = (None, "cache_dir", "device")
"""What a problem concerns that may be gone at the next attempt, with the same settings."""


class UnknownJobError(UserError):
    """There is no job of this number (any more)."""

    def __init__(self, job_id: object):
        super().__init__(f"There is no run {job_id}.", remedy="It may have been deleted; reload the list.")


def full_disk(folder: Path) -> Problem:
    """What a person reads when there is no room for what the trainer writes."""
    message = f"The disk is full: nothing more can be written to {folder}."
    return Problem(message, remedy="Free some space and try again.")


@dataclass(frozen=True)
class Job:
    """One row of the queue.

    active: a worker has it in hand; still true after a crash, which is how an interrupted job is recognized.
    attempt: how often it was started; a new attempt rewrites the metrics from the step it resumes at.
    position: place in the queue; the lowest queued one is next. Times are seconds since 1970.
    config: YAML as it was submitted; effective_config: YAML as it ran, every setting named.
    folder: name of its folder under ``<data>/jobs``. result: ``lora``, ``diffusers`` and ``thumbnail`` (paths inside
    that folder), ``published`` (path in the host's LoRA folder), ``published_step`` (when that is no finished LoRA but
    what the run saved at this step), ``chosen_step`` and ``chosen_weight`` (by a person, or the recommended step),
    ``recommended_step``, ``advice`` (what held-out pictures say of the run) and ``verified`` (bool), as far as they
    exist.
    task: the kind of training, one of the setting ``task``; empty for a job of an earlier release.
    architecture: fingerprint of how the base model is built. speed: optimizer steps per second. timings: of each part
    of the run (training, previews, encoding, loading, saving, ending) its seconds, without what other programs took of
    the processor, and the number of pictures or files that they were for. memory: peak bytes on
    the device. revision: grows with every change of any job.
    """

    id: int
    name: str
    status: str
    active: bool
    attempt: int
    position: float
    config: str
    effective_config: str
    folder: str
    dataset: str
    base_model: str
    family: str
    architecture: str
    task: str
    host: str
    created: float
    started: float | None
    finished: float | None
    step: int
    total_steps: int
    epoch: int
    phase: str
    phase_done: int
    phase_total: int
    loss: float | None
    speed: float | None
    pictures_per_second: float | None
    timings: dict[str, list]
    seconds_left: float | None
    memory: int | None
    seconds: float
    error: Problem | None
    warnings: tuple[Problem, ...]
    result: dict[str, Any]
    revision: int

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def fails_again(self) -> bool:
        """It failed by one of its own settings, which the next attempt would have again."""
        return self.status == "failed" and self.error is not None and self.error.field not in _PASSING


@dataclass(frozen=True)
class Event:
    """One line of a job's history. kind: status, phase, saved, preview, warning, error."""

    id: int
    job_id: int
    time: float
    kind: str
    text: str
    data: dict[str, Any]
