"""What a job would take, before it is submitted: by its pictures, and by the jobs before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_trainer.config.facts import CHANGES
from lora_trainer.errors import ConfigError, UserError, concerning
from lora_trainer.jobs.execution import lender_of
from lora_trainer.jobs.job import ACTIVE
from lora_trainer.jobs.store import JobStore
from lora_trainer.jobs.submitting import check_beginning, check_settings, check_shown, name_taken, stored_config
from lora_trainer.planning.changes import estimate_change
from lora_trainer.planning.cost import PastRun
from lora_trainer.planning.estimate import estimate, look_at_pictures
from lora_trainer.planning.text import estimate_text, rows_of
from lora_trainer.workspace.captioners import captioner_sources

if TYPE_CHECKING:
    from lora_trainer.config import TrainConfig
    from lora_trainer.host.base import Host
    from lora_trainer.models.base import ModelInfo

_RECENT = 50  # jobs that are searched for comparable ones
_MIN_STEPS = 5  # a shorter run says nothing about speed
_TRAINED = ("running", "paused", "finished", "stopped", "failed", "interrupted")


def estimate_job(
    settings: Mapping[str, Any] | str, host: Host, store: JobStore, shown: str | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """``planning.estimate``, or ``planning.text``, of these settings, and ``name_taken``: why the LoRA cannot be called
    so, or None.

    shown: see ``check_shown``.

    Raises:
        UserError, ConfigError: what would stop the run, naming the field.
    """
    from lora_trainer.run import with_work_for_all

    config, info = check_wish(settings, host, shown, gone)
    config = with_work_for_all(config, len(config.gpus or ()))
    past = QueuedRuns(store)
    if config.task == "text":
        found = estimate_text(config, info, host, past)
    elif config.task in CHANGES:
        found = estimate_change(config, info, host, past)
    else:
        found = estimate(config, info, host, captioner_sources(host), past, gone)
    return {
        **found,
        "name_taken": None if config.overwrite else name_taken(store, host, config.output_name),
    }


def check_wish(
    settings: Mapping[str, Any] | str, host: Host, shown: str | None, gone: Callable[[], bool] = lambda: False
) -> tuple[TrainConfig, ModelInfo]:
    """The checked settings and the base model.

    shown: see ``check_shown``. gone: see ``estimate``.

    Raises:
        UserError, ConfigError: with all that would stop the run, of the settings, the base model and the pictures.
    """
    try:
        config = check_settings(settings, host)
    except ConfigError as error:
        raise _with_all_others(error, error.config, host, gone) from None
    check_shown(config, host, shown)
    try:
        return config, check_base(config, host)
    except UserError as error:
        raise _with_all_others(error, config, host, gone) from None


def _with_all_others(found: UserError, config: TrainConfig, host: Host, gone: Callable[[], bool]) -> UserError:
    from lora_trainer.run import look_at_data, with_all_others

    def look(config: TrainConfig) -> None:
        if config.task != "image":
            look_at_data(config)
        else:
            check_data(config, host, gone)

    return with_all_others(found, config, lambda config: lender_of(host, config), look) or found


def check_base(config: TrainConfig, host: Host) -> ModelInfo:
    """The base model, without loading it. Raises UserError when it, or a file that the settings name, would stop the
    run."""
    with concerning("base_model"):
        info = lender_of(host, config).describe()
    check_beginning(config)
    return info


def check_run(config: TrainConfig, host: Host) -> None:
    """Everything that can be known to stop a run before it begins. Raises UserError."""
    check_base(config, host)
    check_data(config, host)


def check_data(config: TrainConfig, host: Host, gone: Callable[[], bool] = lambda: False) -> None:
    """Raises UserError where there is nothing to train on, or a picture without a caption."""
    if config.task == "text":
        rows_of(config)
        return
    if config.task in CHANGES:
        from lora_trainer.run import look_at_data

        look_at_data(config)
        return
    _, _, problems = look_at_pictures(config, captioner_sources(host), gone)
    for problem in problems:
        raise UserError(problem.message, field=problem.field, remedy=problem.remedy)


class QueuedRuns:
    """The ``PastRuns`` of the queue."""

    def __init__(self, store: JobStore):
        self._store = store

    def busy(self) -> bool:
        return bool(self._store.jobs(ACTIVE))

    def on(self, host: str, architecture: str) -> Iterator[PastRun]:
        for job in self._store.jobs(_TRAINED, limit=_RECENT):
            if (job.host, job.architecture) != (host, architecture) or job.step < _MIN_STEPS:
                continue
            try:
                config = stored_config(self._store.get(job.id))
            except UserError:
                continue  # deleted in between, or written by an older release with settings that are gone
            timings = {name: (seconds, count) for name, (seconds, count) in job.timings.items()}
            yield PastRun(job.id, job.name, config, job.pictures_per_second, job.memory, timings)
