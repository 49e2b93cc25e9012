"""Minutes and memory of a run, told before it starts: as a comparable job took them, else by a forecast."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig, parse_resolution
from lora_trainer.errors import UserError
from lora_trainer.jobs.job import ACTIVE, Job
from lora_trainer.jobs.memory import kept_for_later, memory_in_use
from lora_trainer.jobs.store import JobStore
from lora_trainer.jobs.submitting import stored_config

if TYPE_CHECKING:
    import torch

    from lora_trainer.host.base import Host
    from lora_trainer.models.architecture import Architecture
    from lora_trainer.models.base import ModelInfo
    from lora_trainer.training.forecast import Weightless
    from lora_trainer.training.precision import Precision

log = logging.getLogger(__name__)

_RECENT = 50  # jobs that are looked at for one that is comparable
_MIN_STEPS = 5  # a shorter run says nothing about speed
_TRAINED = ("running", "paused", "finished", "stopped", "failed", "interrupted")
_CPU_SIDE = 512
"""A CPU works no faster on larger pictures, and trying it on them would take long."""

_trials: dict[Any, _Trial] = {}
_in_use_idle: dict[Any, int | None] = {}  # bytes, by device, when nothing was trained there last
_trying = threading.Lock()


def cost(config: TrainConfig, info: ModelInfo, steps: int, host: Host, store: JobStore) -> dict[str, Any]:
    """``minutes``, ``memory`` (bytes) and ``basis``, the job that they are taken from; None for what is not known.

    The newest comparable job counts, one of the same kind of model and memory-saving settings, which may still run.
    As long as there is none, a piece of the model is tried on the device (a second, once), unless somebody computes
    there.

    Raises:
        UserError: no layer of the model would learn.
    """
    found: dict[str, Any] = {"minutes": None, "memory": None, "basis": None}
    size = _size(config, info)
    for job in store.list(_TRAINED, limit=_RECENT):
        if job.host != host.name or job.family != info.family or job.step < _MIN_STEPS or not job.speed:
            continue
        before = _stored(store, job)
        if before is None or _kind(before) != _kind(config):
            continue
        work, work_before = _pixels_per_step(config, size), _pixels_per_step(before, _size(before, info))
        same_memory = config.batch_size == before.batch_size and work == work_before
        found["minutes"] = steps / job.speed * work / work_before / 60
        found["memory"] = job.memory if same_memory else None
        found["basis"] = job.id
        break
    if info.architecture is not None and None in (found["minutes"], found["memory"]):
        forecast = _forecast(config, info, size, steps, host, bool(store.list(ACTIVE)))
        found = {name: forecast.get(name) if value is None else value for name, value in found.items()}
    return found


def _forecast(
    config: TrainConfig, info: ModelInfo, size: tuple[int, int], steps: int, host: Host, busy: bool
) -> dict[str, Any]:
    from lora_trainer.training.forecast import memory_needed, work_on_batch
    from lora_trainer.training.precision import resolve

    precision = resolve(host.device() if config.device == "auto" else config.device, config.mixed_precision)
    trial = _try(info.architecture, precision, size, host, busy)
    if trial is None:
        return {}
    found: dict[str, Any] = {}
    if trial.speed is not None:
        operations = work_on_batch(info.architecture, size, config).operations * config.gradient_accumulation_steps
        found["minutes"] = steps * operations / trial.speed / 60
    needed = memory_needed(trial.model, size, config, precision, with_weights=not host.holds_model())
    if not busy:  # a training in hand has taken memory of its own, which will be free again
        _in_use_idle[precision.device] = _in_use(precision.device)
    in_use = _in_use_idle.get(precision.device)
    return found | {"memory": None if in_use is None else in_use + needed}


def _in_use(device: torch.device) -> int | None:
    """Bytes that are taken now and stay taken: what torch only keeps for later, a run will take first."""
    found = memory_in_use()
    return None if found is None else found - kept_for_later(device)


@dataclass(frozen=True)
class _Trial:
    """model: without its weights. speed: operations per second; None where the device had no memory for it."""

    model: Weightless
    speed: float | None


def _try(
    architecture: Architecture, precision: Precision, size: tuple[int, int], host: Host, busy: bool
) -> _Trial | None:
    """What a turn of the host's shows, once for each kind of work; None while the device is not to be had."""
    from lora_trainer.training.forecast import Weightless
    from lora_trainer.training.throughput import throughput

    if precision.device.type != "cuda":
        size = (min(size[0], _CPU_SIDE), min(size[1], _CPU_SIDE))
    key = architecture, precision, size
    with _trying:
        if key in _trials or busy:
            return _trials.get(key)
        with host.spare_turn() as ours:
            if not ours:
                return None
            model = Weightless.of(architecture)
            try:
                _trials[key] = _Trial(model, throughput(architecture.unet, precision, size))
            except RuntimeError as error:  # of a full GPU above all; the run itself would say more
                log.warning("How fast the device trains could not be tried: %s", error)
                return _Trial(model, None)
        return _trials[key]


def _kind(config: TrainConfig) -> tuple[Any, ...]:
    return config.device, config.mixed_precision, config.gradient_checkpointing, config.train_text_encoder


def _size(config: TrainConfig, info: ModelInfo) -> tuple[int, int]:
    """Width and height of the pictures, in pixels."""
    size = parse_resolution(config.resolution)
    return size if isinstance(size, tuple) else (info.default_resolution, info.default_resolution)


def _pixels_per_step(config: TrainConfig, size: tuple[int, int]) -> int:
    return size[0] * size[1] * config.batch_size * config.gradient_accumulation_steps


def _stored(store: JobStore, job: Job) -> TrainConfig | None:
    try:
        return stored_config(store.get(job.id))
    except UserError:
        return None  # deleted in between, or written by an older release with settings that are gone
