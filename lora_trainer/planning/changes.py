"""What a run that learns a change will take, before it starts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig, never_reached, parse_resolution, without_effect
from lora_trainer.planning.cost import PastRuns, cost, counts
from lora_trainer.planning.duration import Length

if TYPE_CHECKING:
    from lora_trainer.host.base import Host
    from lora_trainer.models.base import ModelInfo


def estimate_change(config: TrainConfig, info: ModelInfo, host: Host, past: PastRuns) -> dict[str, Any]:
    """Pictures, steps, minutes and memory, by the names of ``planning.estimate``. ``task``: the run's.

    Raises:
        UserError: what would stop the run, naming the field.
    """
    from lora_trainer.models.families import get_family
    from lora_trainer.run import look_at_data

    family = get_family(info.family)
    family.check_settings(config)
    side = family.default_resolution(info)
    each = config.batch_size * config.gradient_accumulation_steps
    warnings: list[str] = []
    buckets: list[dict[str, Any]] = []
    pictures = steps_per_epoch = visits_per_epoch = 0
    if config.task == "words":
        from lora_trainer.training.change_inputs import WORD_STEPS, kept_batches

        look_at_data(config)
        steps = steps_per_epoch = config.max_train_steps or WORD_STEPS
        takes_negative = info.architecture is None or family.takes_negative(info.architecture)
        visits = float(steps * each * (1 + kept_batches(config, takes_negative)))
        size = parse_resolution(config.resolution)
        width, height = size if isinstance(size, tuple) else (side, side)
        buckets = [{"resolution": [width, height], "images": 1}]
    else:
        first, second, plan, warnings = _two_datasets(config, side, family.latents.multiple)
        pictures = len(first.samples) + len(second.samples)
        buckets, visits_per_epoch = plan.table(), plan.visits_per_epoch
        steps_per_epoch = -(-plan.steps_per_epoch // config.gradient_accumulation_steps)
        steps = config.max_train_steps or config.epochs * steps_per_epoch
        if config.pair_method == "copier" and config.task == "pair":
            steps = config.max_train_steps or config.copy_steps
            steps += 0 if config.copied_lora else config.copy_steps
        shown = min(each, visits_per_epoch)
        visits = float(steps * shown * (2 if config.task == "slider" else 1))
    length = Length(visits, pictures, steps, steps_per_epoch)
    # A step of the sources that are read side by side has as much in memory as one of a single source.
    return {
        "task": config.task,
        "pictures": pictures,
        "warnings": [
            *without_effect(config, family.unused, config.task),
            *never_reached(config, steps, steps_per_epoch),
            *warnings,
        ],
        "buckets": buckets,
        "visits_per_epoch": visits_per_epoch,
        **counts(config, info, side, steps, steps_per_epoch),
        **cost(dataclasses.replace(config, preserve=0.0), info, length, host, past),
    }


def _two_datasets(config: TrainConfig, side: int, multiple: int) -> tuple[Any, Any, Any, list[str]]:
    """Both data sets, the plan of the longer epoch, and what is to be told. Raises UserError."""
    from lora_trainer.dataset.buckets import BatchPlan
    from lora_trainer.planning.measured import measure
    from lora_trainer.run.workloads import workload_of
    from lora_trainer.run.workloads.pairs import TwoDatasets

    workload = workload_of(config)
    assert issubclass(workload, TwoDatasets)
    workload.check(config)
    first, second, warnings = workload.read(config, measure=measure)
    plans = [BatchPlan.from_config(one, config, side, multiple) for one in (first, second)]
    plan = max(plans, key=lambda one: one.steps_per_epoch)
    return first, second, plan, [*dict.fromkeys([*first.warnings, *second.warnings, *warnings])]
