"""What a run will take, before it starts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig, never_reached, without_effect
from lora_trainer.errors import Problem
from lora_trainer.planning.cost import PastRuns, cost, counts
from lora_trainer.planning.duration import Length

if TYPE_CHECKING:
    from lora_trainer.captioning.registry import Sources
    from lora_trainer.dataset.samples import Dataset
    from lora_trainer.host.base import Host
    from lora_trainer.models.base import ModelInfo

_STAND_IN = "a picture"  # for captions that are not there yet; what they say changes none of the figures

# Two pages that ask at once: the second finds what the first has measured, instead of decoding beside it.
_scanning = threading.Lock()


class NobodyWaitsError(Exception):
    """Who asked has gone, or asks for something else by now."""


def estimate(
    config: TrainConfig, info: ModelInfo, host: Host, sources: Sources, past: PastRuns,
    gone: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Pictures that would be used and refused, buckets, steps, minutes and memory.

    Keys: ``pictures``, ``regularization_pictures``, ``refused`` [{file, reason}], ``warnings``, ``buckets``,
    ``visits_per_epoch``, ``repeats`` (None where the pictures differ in them, or others are seen as well), ``epochs``,
    ``batch_size``, ``accumulation``, ``stops_at``, ``steps_per_epoch``, ``steps``, ``base_model``, ``family``,
    ``resolution``, and what ``cost`` finds. ``captioner`` describes the pictures first, as they have no captions; None
    where none is needed, or can run. ``problems`` [``Problem``]: what would stop the run although its pictures can be
    counted.

    gone: whether nobody waits for the answer any more; looking at the pictures of a large folder ends then.

    Raises:
        UserError: what would stop the run, naming the field.
        NobodyWaitsError: see ``gone``.
    """
    from lora_trainer.dataset.buckets import BatchPlan
    from lora_trainer.models.families import get_family

    dataset, captioner, problems = look_at_pictures(config, sources, gone)
    family = get_family(info.family)
    family.check_settings(config)
    side = family.default_resolution(info)
    plan = BatchPlan.from_config(dataset, config, side, family.latents.multiple)
    steps_per_epoch = math.ceil(plan.steps_per_epoch / config.gradient_accumulation_steps)
    steps = config.max_train_steps or steps_per_epoch * config.epochs
    visits = plan.visits_per_epoch * steps / steps_per_epoch
    regularization = sum(sample.is_regularization for sample in dataset.samples)
    repeats = {sample.repeats for sample in dataset.samples}
    return {
        "pictures": len(dataset.samples) - regularization,
        "regularization_pictures": regularization,
        "refused": [{"file": str(item.path), "reason": item.reason} for item in dataset.skipped],
        "warnings": [
            *without_effect(config, family.unused),
            *never_reached(config, steps, steps_per_epoch),
            *dataset.warnings,
        ],
        "captioner": captioner,
        "problems": problems,
        "buckets": plan.table(),
        "visits_per_epoch": plan.visits_per_epoch,
        "repeats": repeats.pop() if len(repeats) == 1 and not regularization else None,
        **counts(config, info, side, steps, steps_per_epoch),
        **cost(config, info, Length(visits, len(dataset.samples), steps, steps_per_epoch), host, past),
    }


def look_at_pictures(
    config: TrainConfig, sources: Sources, gone: Callable[[], bool] = lambda: False
) -> tuple[Dataset, str | None, list[Problem]]:
    """The pictures of a run, the captioner that describes them first, and what would stop the run although they can be
    counted.

    Raises:
        UserError: there is nothing to train on.
        NobodyWaitsError: ``gone`` says so.
    """
    from lora_trainer.dataset.folder import UncaptionedError, scan
    from lora_trainer.planning.measured import measure
    from lora_trainer.run.captioning import training_captioner

    def progress(done: int, total: int) -> None:
        if gone():
            raise NobodyWaitsError

    with _alone(progress):
        try:
            return scan(config, progress, measure), None, []
        except UncaptionedError as error:
            captioner = training_captioner(config, sources)
            problems = [] if captioner else [Problem.of(error)]
            return scan(config, progress, measure, _STAND_IN), captioner, problems


@contextmanager
def _alone(look: Callable[[int, int], None]) -> Iterator[None]:
    """Inside nobody else scans. ``look`` is called while it waits for that."""
    while not _scanning.acquire(timeout=0.2):
        look(0, 0)
    try:
        yield
    finally:
        _scanning.release()
