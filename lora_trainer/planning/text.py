"""What a run on rows of text will take, before it starts."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig, never_reached, without_effect
from lora_trainer.planning.cost import PastRun, PastRuns, architecture_mark, precision_of
from lora_trainer.planning.duration import MEASURED, TRIED, Span, total
from lora_trainer.planning.memory import kept_for_later, memory_in_use

if TYPE_CHECKING:
    import torch

    from lora_trainer.dataset.text.encoding import EncodedRow, Encoder
    from lora_trainer.host.base import Host
    from lora_trainer.models.base import ModelInfo
    from lora_trainer.models.families.causal_lm.work import MetaLanguageModel
    from lora_trainer.training.precision import Precision

_KNOWN = 8
_TRIAL_SECONDS, _TRIAL_AGE = 0.2, 600.0
_TRIAL_TOKENS = 256
_REST = 0.6
"""The matrix products of a step run at this share of the speed at which they run alone: assumed, not measured."""
_LOADING, _READ_BYTES, _ENDING = 5.0, 3e8, 2.0  # seconds at least, bytes a second
_NF4_BYTES = 0.57  # of a weight in 4 bits, with the scales of its group
_HEAD_BYTES = 3 * 2**25  # of the logits of a chunk, and what is made of them

_lock = threading.Lock()
_encoders: dict[Any, Encoder] = {}
_rows: dict[Any, tuple[list[EncodedRow], list[str]]] = {}
_models: dict[Any, MetaLanguageModel] = {}
_speeds: dict[Any, tuple[float, float]] = {}  # operations a second, and when


@dataclass(frozen=True)
class _Work:
    """trained: rows of an epoch, repeats not counted. tokens, learned: in them. longest: tokens of the longest row."""

    trained: int
    tokens: int
    learned: int
    longest: int
    steps: int
    visits: float


def estimate_text(config: TrainConfig, info: ModelInfo, host: Host, past: PastRuns) -> dict[str, Any]:
    """Rows, tokens, steps, minutes and memory, by the names of ``planning.estimate``.

    ``rows``: that are learned from. ``held_out``: rows among these that only measure. ``tokens``, ``learned``: of those
    that are trained, once.

    Raises:
        UserError: what would stop the run, naming the field.
    """
    from lora_trainer.dataset.text.held_out import hold_out_rows
    from lora_trainer.dataset.text.plan import RowPlan
    from lora_trainer.run.workloads.text import refuse_other_adapters

    refuse_other_adapters(config)
    usable, warnings = rows_of(config)
    trained = hold_out_rows(usable, config.validation_share, config.seed).trained if config.validation_share else usable
    plan = RowPlan.from_config([len(row) for row in trained], config)
    steps = config.max_train_steps or config.epochs * plan.steps_per_epoch
    visits = len(trained) * config.repeats
    work = _Work(
        len(trained), sum(map(len, trained)), sum(sum(row.learned) for row in trained), max(map(len, trained)), steps,
        visits * steps / plan.steps_per_epoch,
    )  # fmt: skip
    return {
        "task": "text",
        "rows": len(usable),
        "held_out": len(usable) - len(trained),
        "tokens": work.tokens,
        "learned": work.learned,
        "longest": work.longest,
        "warnings": [
            *without_effect(config, task="text"),
            *never_reached(config, steps, plan.steps_per_epoch),
            *warnings,
        ],
        "visits_per_epoch": visits,
        "repeats": config.repeats,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "stops_at": config.max_train_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": steps,
        "base_model": info.name,
        "family": info.family,
        **_cost(config, info, work, host, past),
    }  # fmt: skip


def encoder_for_page(config: TrainConfig) -> Encoder:
    """``run.workloads.text.encoder_for``, made once for each folder and template."""
    from lora_trainer.run.workloads.text import encoder_for

    key = _encoding(config)
    with _lock:
        if key not in _encoders:
            _keep(_encoders, key, encoder_for(config))
        return _encoders[key]


def _encoding(config: TrainConfig) -> tuple[Any, ...]:
    """What decides on how rows are encoded."""
    return config.base_model, config.chat_template, config.max_length, config.system_prompt


def rows_of(config: TrainConfig) -> tuple[list[EncodedRow], list[str]]:
    """``run.workloads.text.usable_rows``, once for each version of the files."""
    from lora_trainer.dataset.text.rows import text_files
    from lora_trainer.run.workloads.text import usable_rows

    files = text_files(Path(config.train_data_dir))
    facts = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    key = _encoding(config), facts
    with _lock:
        known = _rows.get(key)
    if known is None:
        known = usable_rows(config, encoder_for_page(config))
        with _lock:
            _keep(_rows, key, known)
    return known


def _cost(config: TrainConfig, info: ModelInfo, work: _Work, host: Host, past: PastRuns) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(
        ("minutes", "minutes_low", "minutes_high", "memory", "basis", "basis_name", "memory_basis")
    )
    found |= {"parts": {}, "shorter": []}
    precision, busy = precision_of(config, host), past.busy()
    model = _model(config, info, host, busy)
    if model is None:
        return found
    memory, weights = _memory(model, config, precision, work)
    in_use = memory_in_use(precision.device)
    if in_use is not None:
        # The WebUI's own model leaves the device first.
        rest = max(0, in_use - kept_for_later(precision.device) - host.model_bytes())
        found["memory"] = rest + memory if precision.device.type == "cpu" else memory
    same = _comparable(config, info, host, past)
    if same is not None and same.pace:
        training = Span.within(work.visits / same.pace, MEASURED)
        found |= {"basis": same.id, "basis_name": same.name}
    else:
        speed = _speed(model, precision, host, busy)
        if speed is None:
            return found
        times = work.visits / work.trained
        length = work.tokens / work.trained
        checkpointing = config.given_gradient_checkpointing
        operations = model.operations(work.tokens * times, work.learned * times, length, checkpointing)
        training = Span.within(operations / (speed * _REST), TRIED)
    loading = Span.within(_LOADING + weights / _READ_BYTES, 3.0)
    ending = Span.within(_ENDING, 3.0)
    parts = {"training": training, "loading": loading, "ending": ending}
    whole = total(parts)
    found |= {"minutes": whole.expected / 60, "minutes_low": whole.least / 60, "minutes_high": whole.most / 60}
    found["parts"] = {name: part.expected / 60 for name, part in parts.items()}
    return found


def _comparable(config: TrainConfig, info: ModelInfo, host: Host, past: PastRuns) -> PastRun | None:
    """The newest run on such a model with the same rows and batches: rows a second depend on how long they are."""
    names = ("train_data_dir", "max_length", "batch_size", "gradient_checkpointing", "quantize", "mixed_precision",
             "lora_rank", "target_modules")  # fmt: skip
    for run in past.on(host.name, architecture_mark(info.architecture)):
        if run.pace and all(getattr(run.config, name) == getattr(config, name) for name in names):
            return run
    return None


def _memory(model: MetaLanguageModel, config: TrainConfig, precision: Precision, work: _Work) -> tuple[int, float]:
    """Bytes of a run at its fullest moment, and those of the weights in it. Raises UserError where nothing learns."""
    from lora_trainer.adapters.inject import choose
    from lora_trainer.models.sharding import WHOLE_BLOCKS
    from lora_trainer.training.forecast import learning_bytes, number_bytes

    choose(model.targets, config)  # which finds what selects no layer
    stored, computed = number_bytes(precision.weight_dtype), number_bytes(precision.compute_dtype)
    weights: float = model.weights * stored
    if config.quantize == "nf4":
        weights = (model.weights - model.in_blocks) * stored + model.in_blocks * _NF4_BYTES
    tokens = work.longest * min(config.batch_size, work.trained * config.repeats)
    kept = model.kept(tokens, config.given_gradient_checkpointing) * computed
    held, processes = weights, len(config.gpus or ())
    if config.shard_base and processes > 1:
        absent = model.blocks * (1 - 1 / processes) - WHOLE_BLOCKS
        held -= max(0, absent) * model.in_blocks / model.blocks * stored
    return int(held + learning_bytes(model.targets, config) + kept + _HEAD_BYTES), weights


def _model(config: TrainConfig, info: ModelInfo, host: Host, busy: bool) -> MetaLanguageModel | None:
    """The model without its weights, built in a turn of the host's; None while there is none to be had."""
    from lora_trainer.models.families.causal_lm.families import REMOTE_CODE
    from lora_trainer.models.families.causal_lm.work import MetaLanguageModel

    if info.architecture is None or info.family == REMOTE_CODE:
        return None
    with _lock:
        if info.architecture not in _models and not busy:
            with host.spare_turn() as ours:
                if ours:
                    settings = json.loads(info.architecture.settings)
                    _keep(_models, info.architecture, MetaLanguageModel.of(Path(config.base_model), settings))
        return _models.get(info.architecture)


def _speed(model: MetaLanguageModel, precision: Precision, host: Host, busy: bool) -> float | None:
    """Operations a second of the device in products of such matrices, tried in a turn of the host's."""
    key = model.width, model.inner, precision
    with _lock:
        known = _speeds.get(key)
        if busy or (known is not None and time.monotonic() - known[1] < _TRIAL_AGE):
            return known and known[0]
        with host.spare_turn() as ours:
            if not ours:
                return known and known[0]
            try:
                _keep(_speeds, key, (_tried(model, precision.device, precision.compute_dtype), time.monotonic()))
            except RuntimeError:  # of a full GPU above all; the run itself would say more
                return None
        return _speeds[key][0]


def _tried(model: MetaLanguageModel, device: torch.device, dtype: torch.dtype) -> float:
    import torch

    rows = torch.randn(_TRIAL_TOKENS, model.width).to(device, dtype)
    matrix = torch.randn(model.width, model.inner).to(device, dtype)
    best, passes, started = math.inf, 0, time.perf_counter()
    while passes < 3 or time.perf_counter() - started < _TRIAL_SECONDS:
        begin = time.perf_counter()
        (rows @ matrix)[:1, :1].cpu()
        best, passes = min(best, time.perf_counter() - begin), passes + 1
    return 2 * _TRIAL_TOKENS * model.width * model.inner / best


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to what is known; the oldest makes room."""
    while key not in known and len(known) >= _KNOWN:
        del known[next(iter(known))]
    known[key] = value
