"""Minutes and memory of a run, told before it starts: as a comparable job took them, else by a forecast."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
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
_DEVICE = ("device", "mixed_precision")
_FILLS_MEMORY = (
    *_DEVICE, "batch_size", "gradient_checkpointing", "train_text_encoder", "text_encoder_lr", "adapter", "lora_rank",
    "conv_rank", "lokr_factor", "dora", "target_modules", "text_encoder_target_modules", "block_ranks", "optimizer",
    "ema_decay",
)  # fmt: skip
_CPU_SIDE = 512
"""A CPU works no faster on larger pictures, and trying it on them would take long."""
_TRIAL_AGE = 600.0  # seconds after which a device is tried again: it may have been slowed down by others
_MAX_TRIALS = 8

_trials: dict[Any, _Trial] = {}
_in_use_idle: dict[Any, int | None] = {}  # bytes, by device, when nothing was trained there last
_trying = threading.Lock()


def architecture_mark(architecture: Architecture | None) -> str:
    """By which a later run finds the jobs on models that are built alike; "" where that is not known."""
    return "" if architecture is None else hashlib.sha256(repr(architecture).encode()).hexdigest()[:16]


def precision_of(config: TrainConfig, host: Host) -> Precision:
    """Where a run computes, and in which formats. Raises UserError for what the device lacks."""
    from lora_trainer.training.precision import resolve

    return resolve(host.device() if config.device == "auto" else config.device, config.mixed_precision)


def cost(config: TrainConfig, info: ModelInfo, visits: float, host: Host, store: JobStore) -> dict[str, Any]:
    """``minutes`` and ``memory`` (bytes), with ``basis`` and ``memory_basis``, the jobs that they are taken from.

    visits: pictures that the run shows the model, all repetitions counted.

    The newest job on a model that is built alike counts, one that may still run: its minutes with other settings as
    well, by the work that they make, its memory only with the same ones. Else it is a forecast, for which a piece of
    the model is tried on the device (a second, now and then), unless somebody computes there. None is what is not
    known.

    Raises:
        UserError: no layer of the model would learn.
    """
    found: dict[str, Any] = dict.fromkeys(("minutes", "memory", "basis", "memory_basis"))
    if info.architecture is None:
        return found
    size = _size(config, info)
    forecast = _forecast(config, info, size, visits, host, bool(store.list(ACTIVE)))
    for job in store.list(_TRAINED, limit=_RECENT):
        if job.host != host.name or job.architecture != architecture_mark(info.architecture) or job.step < _MIN_STEPS:
            continue
        before = _stored(store, job)
        if before is None or _values(before, _DEVICE) != _values(config, _DEVICE):
            continue
        if found["basis"] is None and job.pictures_per_second:
            work = _work_on_picture(config, info, size) / _work_on_picture(before, info, _size(before, info))
            found |= {"minutes": visits / job.pictures_per_second * work / 60, "basis": job.id}
        alike = _values(before, _FILLS_MEMORY) == _values(config, _FILLS_MEMORY) and _size(before, info) == size
        if found["memory_basis"] is None and alike and job.memory:
            found |= {"memory": job.memory, "memory_basis": job.id}
        if None not in found.values():
            break
    return found | {name: value for name, value in forecast.items() if found[name] is None}


def _forecast(
    config: TrainConfig, info: ModelInfo, size: tuple[int, int], visits: float, host: Host, busy: bool
) -> dict[str, Any]:
    from lora_trainer.training.forecast import memory_needed

    precision = precision_of(config, host)
    trial = _try(info.architecture, precision, size, host, busy)
    if trial is None:
        return {}
    found: dict[str, Any] = {}
    if trial.speed is not None:
        found["minutes"] = visits * _work_on_picture(config, info, size) / trial.speed / 60
    needed = memory_needed(trial.model, size, config, precision, weights_there=host.model_bytes())
    if not busy:  # a training in hand has taken memory of its own, which will be free again
        _in_use_idle[precision.device] = _in_use(precision.device)
    in_use = _in_use_idle.get(precision.device)
    return found | {"memory": None if in_use is None else in_use + needed}


def _in_use(device: torch.device) -> int | None:
    """Bytes that are taken now and stay taken: what torch only keeps for later, a run will take first."""
    found = memory_in_use(device)
    return None if found is None else max(0, found - kept_for_later(device))


@dataclass(frozen=True)
class _Trial:
    """model: without its weights. speed: operations per second; None where the device had no memory for it. time: of
    the monotonic clock."""

    model: Weightless
    speed: float | None
    time: float


def _try(
    architecture: Architecture, precision: Precision, size: tuple[int, int], host: Host, busy: bool
) -> _Trial | None:
    """What a turn of the host's shows, now and then for each kind of work; None while the device is not to be had."""
    from lora_trainer.training.forecast import Weightless
    from lora_trainer.training.throughput import throughput

    if precision.device.type == "cpu":
        size = (min(size[0], _CPU_SIDE), min(size[1], _CPU_SIDE))
    key = architecture, precision, size
    with _trying:
        known = _trials.get(key)
        if busy or (known is not None and time.monotonic() - known.time < _TRIAL_AGE):
            return known
        with host.spare_turn() as ours:
            if not ours:
                return known
            model = Weightless.of(architecture)
            try:
                speed = throughput(architecture.unet, precision, size)
            except RuntimeError as error:  # of a full GPU above all; the run itself would say more
                log.warning("How fast the device trains could not be tried: %s", error)
                speed = None if known is None else known.speed
        while len(_trials) >= _MAX_TRIALS:
            del _trials[next(iter(_trials))]
        _trials[key] = _Trial(model, speed, time.monotonic())
        return _trials[key]


def _work_on_picture(config: TrainConfig, info: ModelInfo, size: tuple[int, int]) -> float:
    """Operations of training on one picture."""
    from lora_trainer.training.forecast import work_on_batch

    return work_on_batch(info.architecture, size, config).operations / config.batch_size


def _values(config: TrainConfig, names: tuple[str, ...]) -> list[Any]:
    return [getattr(config, name) for name in names]


def _size(config: TrainConfig, info: ModelInfo) -> tuple[int, int]:
    """Width and height of the pictures, in pixels."""
    size = parse_resolution(config.resolution)
    return size if isinstance(size, tuple) else (info.default_resolution, info.default_resolution)


def _stored(store: JobStore, job: Job) -> TrainConfig | None:
    try:
        return stored_config(store.get(job.id))
    except UserError:
        return None  # deleted in between, or written by an older release with settings that are gone
