"""One attempt at one job: model, training, publishing; and what is said when it fails."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig
from lora_trainer.errors import Problem, UserError, concerning
from lora_trainer.files import disk_is_full
from lora_trainer.jobs import submitting
from lora_trainer.jobs.folders import JobFolders
from lora_trainer.jobs.job import Job, full_disk
from lora_trainer.jobs.previews import HostPreviewer
from lora_trainer.jobs.processes import ProcessError, own_lender, train_in_processes
from lora_trainer.jobs.publishing import NewestWeights, publish
from lora_trainer.jobs.reporting import JobReporter, job_log
from lora_trainer.jobs.results import JobResults
from lora_trainer.jobs.store import JobStore
from lora_trainer.out_of_memory import is_out_of_memory
from lora_trainer.planning.cost import architecture_mark, precision_of
from lora_trainer.workspace.captioners import captioner_sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_trainer.host.base import Host, LenderOptions
    from lora_trainer.models.base import Lender
    from lora_trainer.training.callbacks import TrainCommands

HOLD_OPTION = "lora_trainer_hold_model"
WAIT_OPTION = "lora_trainer_switch_waits"
RESUME_OPTION = "lora_trainer_resume"
RECOMMENDED_OPTION = "lora_trainer_publish_recommended"

log = logging.getLogger(__name__)


def execute(
    current_host: Callable[[], Host],
    store: JobStore,
    folders: JobFolders,
    job: Job,
    reporter: JobReporter,
    commands: TrainCommands,
    train: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Train and publish; returns the columns that say how it ended. Raises nothing that a run can cause.

    current_host: asked again for publishing, as "Reload UI" may have exchanged the host in between.
    """
    log_path = folders.log(job)
    with job_log(log_path, threading.get_ident()):
        try:
            folders.restore(job)
            config = reporter.config = submitting.run_config(job, folders)
            reporter.on_lora = _newest(current_host, store, job, config, reporter)
            result = _train(current_host(), store, job, config, reporter, commands, train, log_path)
        except UserError as error:
            log.error("%s", error)
            return _failed(reporter, _no_room(log_path) if disk_is_full(error) else Problem.of(error))
        except BaseException as error:
            # Whatever happens in a job must neither end the worker nor vanish: it stays with the job, in words.
            log.exception("Job %s failed", job.id)
            return _failed(reporter, unexpected(error, log_path))
        reporter.flush()
        ending = {"status": result.status, "error": None}
        made = _files(result, reporter, folders.of(job), store.get(job.id))
        made |= {"recommended_step": result.recommended, "advice": result.verdict}
        ending["result"] = made
        if result.lora is not None and (result.status == "finished" or commands.saves_before_stop):
            judged = replace(store.get(job.id), result=made)
            ending["result"] |= _publish(current_host(), judged, config, result, reporter, folders, store)
        return {**ending, "timings": reporter.timings()}


def _train(
    host: Host,
    store: JobStore,
    job: Job,
    config: TrainConfig,
    reporter: JobReporter,
    commands: TrainCommands,
    train: Callable[..., Any] | None,
    log_path: Path,
) -> Any:
    if train is None:
        from lora_trainer import run  # torch is slow to import: not before the first job

        train = run.train
    with concerning("base_model"):
        lender = lender_of(host, config)
        info = lender.describe()
    architecture = architecture_mark(info.architecture)
    store.update(job.id, base_model=info.name, family=info.family, architecture=architecture, host=host.name)
    log.info("Job %s, attempt %s: %s on %s (%s)", job.id, job.attempt, job.name, info.name, info.family)
    if config.gpus:
        return _train_beside(config, host, reporter, commands, log_path)
    reporter.device = precision_of(config, host).device
    previewer = None
    if config.preview_prompts and config.task != "text" and host.name != "standalone":  # it has the run's own sampler
        previewer = HostPreviewer(host, lender, config, info, Path(config.output_dir).parent)
    captioners = captioner_sources(host)
    return train(
        config, lender, callbacks=reporter, commands=commands, previewer=previewer, captioners=captioners
    )  # fmt: skip


def _train_beside(
    config: TrainConfig, host: Host, reporter: JobReporter, commands: TrainCommands, log_path: Path
) -> Any:
    """The processes do not have the server's captioners: it describes the pictures before it starts them."""
    from lora_trainer.run import Result
    from lora_trainer.run.captioning import caption_for_training

    if config.task == "image":
        captioned = caption_for_training(config, reporter, commands, host.device_turn, captioner_sources(host))
        if captioned is not None and captioned.cancelled:
            return Result("stopped", 0, 0, 0.0, None, name=config.output_name, trigger_word=config.trigger_word)
    return train_in_processes(config, host, reporter, commands, log_path)


def lender_of(host: Host, config: TrainConfig) -> Lender:
    """Of the base model of a run on this host. Raises UserError when there is none, or it cannot be trained."""
    from lora_trainer.run import check_processes

    check_processes(config, len(config.gpus or ()))
    if config.gpus:
        return own_lender(config, host)
    if config.task != "text":
        return host.lender(config.base_model, lender_options(host, config))
    from lora_trainer.run.workloads.text import Texts

    return host.cleared(Texts.file_lender(config, precision_of(config, host)))


def lender_options(host: Host, config: TrainConfig) -> LenderOptions:
    """How a run with this configuration wants its model. Raises UserError for a precision the device lacks."""

    from lora_trainer.host.base import LenderOptions

    precision = precision_of(config, host)
    return LenderOptions(
        clip_skip=config.clip_skip,
        v_prediction=config.v_prediction,
        zero_terminal_snr=config.zero_terminal_snr,
        compute_dtype=None if config.mixed_precision == "auto" else precision.compute_dtype,
        device=precision.device,
        vae=config.vae,
        text_encoders=tuple(config.text_encoders),
        base_precision=config.base_precision,
        offload_blocks=config.given_offload_blocks,
        hold=bool(host.option(HOLD_OPTION, False)),
        wait_for_model=bool(host.option(WAIT_OPTION, False)),
    )


def drawing_options(host: Host, config: TrainConfig) -> LenderOptions:
    """``lender_options`` for pictures of a finished run: its LoRA is merged into the weights, which stay on the device,
    and which a WebUI has in its own format."""
    options = replace(lender_options(host, config), offload_blocks=0)
    return options if host.name == "standalone" else replace(options, base_precision="stored")


def _newest(
    current_host: Callable[[], Host], store: JobStore, job: Job, config: TrainConfig, reporter: JobReporter
) -> Callable[[Path, int], None] | None:
    """What puts every LoRA that is saved on the way into the host's LoRA folder, if it has one that is for it.

    Trouble with that is reported once and no reason to end the training.
    """
    if current_host().folders().lora is None or config.task == "text":
        return None
    newest = NewestWeights(current_host, store, job.id, config)
    failed_at: list[int] = []

    def show(lora: Path, step: int) -> None:
        if lora.stem == config.output_name:
            return  # the last one, which comes with all that belongs to it when the run is over
        reporter.on_phase("publishing", 0, 0)
        try:
            newest.show(lora, step, reporter.last_preview)
        except Exception as error:  # the host's code, or a full disk
            log.warning("The LoRA of step %s could not be put into the LoRA folder", step, exc_info=True)
            if not failed_at:
                reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                remedy = "The training goes on, and the finished LoRA is put there at its end."
                reporter.warn(Problem(f"It cannot be tried in txt2img before it is finished: {reason}", remedy=remedy))
            failed_at.append(step)

    return show


def _files(result: Any, reporter: JobReporter, folder: Path, job: Job) -> dict[str, Any]:
    """What the job made, as paths inside its folder."""
    made = {"lora": result.lora, "diffusers": result.diffusers, "thumbnail": reporter.last_preview}
    files = dict(job.result)
    for kind, path in made.items():
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            files[kind] = Path(path).resolve().relative_to(folder.resolve()).as_posix()
    return files


def _publish(
    host: Host,
    job: Job,
    config: TrainConfig,
    result: Any,
    reporter: JobReporter,
    folders: JobFolders,
    store: JobStore,
) -> dict[str, Any]:
    """Publish the LoRA if the host has a place for it: the recommended one, where the settings do not say otherwise; a
    language model's stays in the job. A failure is a warning: what was trained is not lost."""
    if host.folders().lora is None or config.task == "text":
        return {}
    lora, picture, step = Path(result.lora), reporter.last_preview, None
    if result.recommended is not None and host.option(RECOMMENDED_OPTION, True):
        step = result.recommended
        lora, picture = Path(result.best), JobResults(store, folders).picture(job, step)
        job = replace(job, step=step, loss=None)
    overwrite = submitting.stored_config(job).overwrite
    try:
        facts = publish(host, job, config, lora, job.name, picture, overwrite=overwrite, on_phase=reporter.on_phase)
        facts |= {"published_step": step, "chosen_step": step}
    except UserError as error:
        safe = "The LoRA is safe in the run; publish it from there."
        reporter.warn(Problem(error.message, error.field, f"{error.remedy} {safe}" if error.remedy else safe))
        return {}
    except Exception as error:  # the host's code; the job itself is done
        log.exception("Publishing failed")
        problem = Problem(
            f"The LoRA could not be published: {type(error).__name__}: {error}",
            remedy="It is safe in the run; publish it from there. The run's log has the details.",
        )
        reporter.warn(problem)
        return {}
    if facts.get("verdict"):
        reporter.warn(Problem(facts["verdict"]))
    return facts


def _failed(reporter: JobReporter, problem: Problem) -> dict[str, Any]:
    reporter.fail(problem)
    return {"status": "failed", "error": problem}


def unexpected(error: BaseException, log_path: Path) -> Problem:
    """In words what nobody foresaw."""
    if is_out_of_memory(error) or (isinstance(error, ProcessError) and error.out_of_memory):
        return Problem(
            "There is not enough memory for this run.",
            "batch_size",
            "Set batch_size: 1, gradient_accumulation_steps: 4, gradient_checkpointing: true and lora_rank: 4 or 8,"
            " or a smaller resolution; then start it again.",
        )
    if disk_is_full(error):
        return _no_room(log_path)
    kind = error.kind if isinstance(error, ProcessError) else type(error).__name__
    return Problem(
        f"Something unexpected happened: {kind}: {error}",
        remedy=f"It can be resumed, and goes on from its last state. Details are in {log_path}.",
    )


def _no_room(log_path: Path) -> Problem:
    message = full_disk(log_path.parent).message
    return Problem(message, remedy="Free some space, then resume it: it goes on from its last state.")
