"""Minutes and memory of a run before it starts: measured in a comparable run, else forecast."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_trainer.config import TrainConfig, parse_resolution, settings_where
from lora_trainer.planning.duration import (
    TRIED,
    Length,
    Span,
    Timings,
    forecast_parts,
    measured_parts,
    total,
    training_factor,
)
from lora_trainer.planning.memory import free_memory, kept_for_later, memory_in_use

if TYPE_CHECKING:
    import torch

    from lora_trainer.host.base import Host
    from lora_trainer.models.base import ModelArchitecture, ModelInfo
    from lora_trainer.models.family import MetaModel
    from lora_trainer.training.precision import Precision
    from lora_trainer.training.throughput import Speed

log = logging.getLogger(__name__)

_PACE = settings_where(lambda facts: facts.sets_pace)
_MEMORY = settings_where(lambda facts: facts.fills_memory)
_CPU_SIDE = 512
"""A CPU works no faster on larger pictures, and trying it on them would take long."""
_TRIAL_AGE = 600.0  # seconds after which a device is tried again: it may have been slowed down by others
_MAX_KNOWN = 8
_COMPARED = 3
"""So many earlier runs give the range of the next one."""
_LONG_MINUTES = 5.0  # from which on it is said what would shorten a run on a CPU
_SMALL_SIDE = 256
_TIMES = ("minutes", "minutes_low", "minutes_high")

_models: dict[ModelArchitecture, MetaModel] = {}
_trials: dict[Any, _Trial] = {}
_in_use_idle: dict[Any, int | None] = {}  # bytes, by device, when nothing was trained there last
_trying = threading.Lock()


@dataclass(frozen=True)
class PastRun:
    """A run that was measured. id, name: of its job. memory: peak bytes on the device. timings: seconds and counts of
    its parts, without what other programs took of the processor. None, or missing, is what was not measured."""

    id: int
    name: str
    config: TrainConfig
    pictures_per_second: float | None
    memory: int | None
    timings: Timings = field(default_factory=dict)

    @property
    def pace(self) -> float | None:
        """Pictures that it trained on in a second."""
        seconds, pictures = self.timings.get("training", (0.0, 0))
        return pictures / seconds if seconds > 0 and pictures else self.pictures_per_second


class PastRuns(Protocol):
    """The runs that were measured on this machine, as the queue keeps them."""

    def busy(self) -> bool:
        """Whether a run is in progress."""

    def on(self, host: str, architecture: str) -> Iterable[PastRun]:
        """The newest runs on this host and a model of this ``architecture_mark``, newest first."""


def architecture_mark(architecture: ModelArchitecture | None) -> str:
    """By which a later run finds the jobs on models that are built alike; "" where that is not known."""
    return "" if architecture is None else hashlib.sha256(repr(architecture).encode()).hexdigest()[:16]


def precision_of(config: TrainConfig, host: Host) -> Precision:
    """Where a run computes, and in which formats. Raises UserError for what the device lacks."""
    from lora_trainer.training.precision import resolve

    device = host.device() if config.device == "auto" else config.device
    return resolve(device, config.mixed_precision, None if config.task == "text" else host.weight_dtype())


def counts(config: TrainConfig, info: ModelInfo, side: int, steps: int, steps_per_epoch: int) -> dict[str, Any]:
    """What every forecast on an image model says of the run itself, by the names of ``planning.estimate``. side: of the
    pictures in pixels, where the setting leaves it to the model."""
    return {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "stops_at": config.max_train_steps,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "base_model": info.name,
        "family": info.family,
        "resolution": str(side) if config.resolution == "auto" else config.resolution,
    }


def cost(config: TrainConfig, info: ModelInfo, length: Length, host: Host, past: PastRuns) -> dict[str, Any]:
    """``minutes`` (expected), ``minutes_low``, ``minutes_high``, their ``parts`` and ``memory`` (bytes), with ``basis``
    and ``memory_basis``, the jobs that they are taken from, and ``basis_name``. ``shorter``: what a run on a CPU would
    take with other settings.

    The newest run on a model that is built alike counts, one that may still run: its minutes with other settings as
    well, by the work that they make, its memory only with the same ones. Else it is a forecast, for which a piece of
    the model is tried on the device (a second, now and then), unless somebody computes there. None is what is not
    known.

    Raises:
        UserError: no layer of the model would learn.
    """
    from lora_trainer.adapters.inject import choose, parameter_count
    from lora_trainer.training.forecast import memory_needed, number_bytes
    from lora_trainer.training.throughput import Speed

    found: dict[str, Any] = dict.fromkeys((*_TIMES, "memory", "basis", "basis_name", "memory_basis"))
    found |= {"parts": {}, "shorter": []}
    if info.architecture is None:
        return found
    size, precision, busy = _size(config, info), precision_of(config, host), past.busy()
    if not busy:  # a training in hand has taken memory of its own, which will be free again
        _in_use_idle[precision.device] = _in_use(precision.device)
    model = _model(info.architecture, host, busy)
    if model is not None:
        choose(model.targets, config)  # which finds what selects no layer

    def placed(one: TrainConfig) -> TrainConfig:
        return one if model is None else _placed(one, model, info, _size(one, info), precision, host)

    alike = [
        run
        for run in past.on(host.name, architecture_mark(info.architecture))
        if _values(run.config, _PACE) == _values(config, _PACE)
    ]
    # What they decided by the memory that was free is not known: it counts as what is free now.
    compared = [run for run in alike if run.pace][:_COMPARED]
    timed = [dataclasses.replace(run, config=placed(run.config)) for run in compared]
    now = placed(config)
    speed: Speed | None
    if timed:
        speed = Speed((timed[0].pace or 1.0) * _work_on_picture(timed[0].config, info))
    else:
        speed = _speed(info.architecture, precision, size, host, busy)
    training = _training(now, info, length, timed, speed)
    if training is not None:
        learns = 0 if model is None else parameter_count(model.targets, config)
        weights = 0 if model is None else model.weights * number_bytes(precision.weight_dtype)
        to_load = max(0, weights - host.model_bytes())
        parts = forecast_parts(info.architecture, config, size, length, speed, to_load, learns)
        for run in reversed(timed):  # the newest has the last word
            parts |= measured_parts(run.timings, (run.config, _size(run.config, info)), (config, size), length)
        parts["training"] = training
        found |= _minutes(parts)
        if timed:
            found |= {"basis": timed[0].id, "basis_name": timed[0].name}
        if precision.device.type == "cpu":
            found["shorter"] = _shorter(config, info, size, found["parts"])
    for run in alike:
        same = _values(run.config, _MEMORY) == _values(config, _MEMORY) and _size(run.config, info) == size
        if found["memory_basis"] is None and same and run.memory:
            found |= {"memory": run.memory, "memory_basis": run.id}
    in_use = _in_use_idle.get(precision.device)
    if found["memory"] is None and model is not None and in_use is not None and not config.gpus:
        there, together = host.model_bytes(), host.name == "a1111"
        found["memory"] = in_use + memory_needed(model, size, now, precision, there, info.stored, together)
    return found


def _placed(
    config: TrainConfig, model: MetaModel, info: ModelInfo, size: tuple[int, int], precision: Precision, host: Host
) -> TrainConfig:
    """``config`` with as many parts computed anew, and blocks in main memory, as in a run that began now."""
    from lora_trainer.models.base import Room
    from lora_trainer.training.forecast import blocks_to_offload, parts_to_recompute

    free = free_memory(host) if precision.device.type == "cuda" else None
    if config.gradient_checkpointing == "auto" and free is not None:
        room = Room(free, host.model_bytes(), host.name == "a1111")
        parts, total = parts_to_recompute(model, size, config, precision, room, info.stored)
        config = dataclasses.replace(config, gradient_checkpointing=parts / total)
    auto = config.offload_blocks == "auto" and config.given_gradient_checkpointing == 1 and host.name == "standalone"
    if free is None or not auto or not model.blocks:
        return config
    blocks = blocks_to_offload(model, size, config, precision, free, info.stored)
    return dataclasses.replace(config, offload_blocks=blocks)


def _training(
    config: TrainConfig, info: ModelInfo, length: Length, timed: Sequence[PastRun], speed: Speed | None
) -> Span | None:
    """Seconds in the steps: as the runs in ``timed`` took them, the newest first, or by the device's speed."""
    from lora_trainer.training.forecast import work_on_batch

    if not timed:
        if speed is None:
            return None
        each = speed.seconds(work_on_batch(info.architecture, _size(config, info), config))
        return Span.within(length.visits / config.batch_size * each / max(1, len(config.gpus or ())), TRIED)
    spans = []
    for run in timed:
        work = _work_on_picture(config, info) / _work_on_picture(run.config, info)
        spans.append(Span.within(length.visits / (run.pace or 1.0) * work, training_factor(work)))
    return Span(spans[0].expected, min(one.least for one in spans), max(one.most for one in spans))


def _minutes(parts: Mapping[str, Span]) -> dict[str, Any]:
    whole = total(parts)
    minutes = {name: seconds / 60 for name, seconds in zip(_TIMES, (whole.expected, whole.least, whole.most))}
    return {**minutes, "parts": {name: part.expected / 60 for name, part in parts.items()}}


def _shorter(config: TrainConfig, info: ModelInfo, size: tuple[int, int], parts: Mapping[str, float]) -> list[Any]:
    """What would take less time on a CPU with large pictures: {name, value, minutes} of settings."""
    rest = sum(parts.values()) - parts["training"]
    if min(size) < _CPU_SIDE or sum(parts.values()) < _LONG_MINUTES:
        return []
    small = dataclasses.replace(config, resolution=str(_SMALL_SIDE))
    work = _work_on_picture(small, info) / _work_on_picture(config, info)
    found = [{"name": "resolution", "value": str(_SMALL_SIDE), "minutes": work * sum(parts.values())}]
    if config.max_train_steps is None and config.epochs > 1:
        half = config.epochs // 2
        minutes = rest + parts["training"] * half / config.epochs
        found.append({"name": "epochs", "value": half, "minutes": minutes})
    return found


def _in_use(device: torch.device) -> int | None:
    """Bytes that are taken now and stay taken: what torch only keeps for later, a run will take first."""
    found = memory_in_use(device)
    return None if found is None else max(0, found - kept_for_later(device))


@dataclass(frozen=True)
class _Trial:
    """speed: None where the device had no memory for it. time: of the monotonic clock."""

    speed: Speed | None
    time: float


def _model(architecture: ModelArchitecture, host: Host, busy: bool) -> MetaModel | None:
    """The model without its weights, built in a turn of the host's; None while there is none to be had."""
    from lora_trainer.models.families import meta_model

    with _trying:
        if architecture not in _models and not busy:
            with host.spare_turn() as ours:
                if ours:
                    _keep(_models, architecture, meta_model(architecture))
        return _models.get(architecture)


def _speed(
    architecture: ModelArchitecture, precision: Precision, size: tuple[int, int], host: Host, busy: bool
) -> Speed | None:
    """The device's, tried in a turn of the host's, now and then for each kind of work; None where it is not known."""
    from lora_trainer.training.throughput import throughput

    if precision.device.type == "cpu":
        size = (min(size[0], _CPU_SIDE), min(size[1], _CPU_SIDE))
    key = architecture, precision, size
    with _trying:
        known = _trials.get(key)
        speed = None if known is None else known.speed
        if busy or (known is not None and time.monotonic() - known.time < _TRIAL_AGE):
            return speed
        with host.spare_turn() as ours:
            if not ours:
                return speed
            try:
                speed = throughput(architecture, precision, size)
            except RuntimeError as error:  # of a full GPU above all; the run itself would say more
                log.warning("How fast the device trains could not be tried: %s", error)
        _keep(_trials, key, _Trial(speed, time.monotonic()))
        return speed


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to what is known; the oldest makes room."""
    while key not in known and len(known) >= _MAX_KNOWN:
        del known[next(iter(known))]
    known[key] = value


def _work_on_picture(config: TrainConfig, info: ModelInfo) -> float:
    """Operations of training on one picture."""
    from lora_trainer.training.forecast import work_on_batch

    return work_on_batch(info.architecture, _size(config, info), config).operations / config.batch_size


def _values(config: TrainConfig, names: tuple[str, ...]) -> list[Any]:
    return [getattr(config, name) for name in names]


def _size(config: TrainConfig, info: ModelInfo) -> tuple[int, int]:
    """Width and height of the pictures, in pixels."""
    from lora_trainer.models.families import get_family

    size, side = parse_resolution(config.resolution), get_family(info.family).default_resolution(info)
    return size if isinstance(size, tuple) else (side, side)
