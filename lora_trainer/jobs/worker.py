"""The server's jobs: one thread trains them in turn, any thread may command them.

The manager lives in the package, not in the WebUI's scripts: "Reload UI" runs those again and finds the manager, with
its thread in the middle of a step, where it was.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig
from lora_trainer.errors import Problem, UserError
from lora_trainer.files import disk_is_full
from lora_trainer.jobs import submitting
from lora_trainer.jobs.estimating import check_base, check_data, check_run, check_wish
from lora_trainer.jobs.execution import RESUME_OPTION, execute, unexpected
from lora_trainer.jobs.folders import JobFolders
from lora_trainer.jobs.grids import Grids
from lora_trainer.jobs.job import ACTIVE, Job, full_disk
from lora_trainer.jobs.lease import WorkerLease
from lora_trainer.jobs.publishing import check_weight, publish
from lora_trainer.jobs.reporting import JobReporter
from lora_trainer.jobs.results import JobResults
from lora_trainer.jobs.store import JobStore
from lora_trainer.requirements import import_networks
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.workspace.lora_tools import LoraTools
from lora_trainer.workspace.paths import check_name
from lora_trainer.workspace.sessions import EditorSessions

if TYPE_CHECKING:
    from lora_trainer.comparison.plan import Wish
    from lora_trainer.host.base import Host

Train = Callable[..., Any]
"""``run.train`` or what stands for it in a test."""

_TAKE_OVER_SECONDS = 2.0  # between two looks whether another server has gone, or the disk has room again
_HAND_OVERS, _HAND_OVER_SECONDS = 40, 0.05  # how long a command waits for a job that changes hands
_MAX_EVENTS = 100_000  # of one job; the oldest save of a long run is among them

log = logging.getLogger(__name__)


@dataclass
class _Running:
    """The job that the worker has in hand."""

    job_id: int
    commands: TrainCommands
    reporter: JobReporter | None = None

    def status(self, waiting: bool) -> str:
        if self.commands.stopping:
            return "stopping"
        if self.commands.paused:
            return "paused"
        return "waiting" if waiting else "running"


class JobManager:
    """The queue with its worker. All methods may be called from any thread; they raise UserError with a remedy."""

    def __init__(self, host: Host, data_dir: Path | None = None, train: Train | None = None):
        """Opens (or makes) the queue under ``data_dir``; nothing runs before ``start_worker``."""
        self.host = host
        self.folders = JobFolders(Path(data_dir or host.folders().data))
        self.store = JobStore(self.folders.data / "jobs.sqlite")
        self.results = JobResults(self.store, self.folders)
        self.grids = Grids(lambda: self.host, self.store, self.results, self.effective_config)
        self.lease = WorkerLease(self.folders.data / "worker.lock")
        self.sessions = EditorSessions(self.folders.data, lambda: self.host)
        self.lora_tools = LoraTools(self.folders.data, lambda: self.host)
        self._train = train
        self._lock = threading.RLock()
        self._naming = threading.RLock()  # a name that was found free is so until the job has it
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._running: _Running | None = None
        self.trouble: Problem | None = None  # why nothing can be trained here, for the tab

    # -- the worker

    def start_worker(self) -> None:
        """Start the thread unless it runs. It is a daemon: a WebUI that ends does not wait for it."""
        import_networks()  # in this thread, before two others import them at the same time
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._closing.clear()
                self._thread = threading.Thread(target=self._work, name="lora-trainer-jobs", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 30.0) -> None:
        """End after this step, its state saved, and let go of the queue; the job in hand can be resumed later."""
        self._closing.set()
        self.grids.close()
        with self._lock:
            if self._running is not None:
                self._running.commands.save_now()
                self._running.commands.stop()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        self.lease.release()
        self.store.close()

    def _work(self) -> None:
        recovered = False
        trouble = None
        while not self._closing.is_set():
            self._wake.clear()
            try:
                if not self._own_queue():
                    self._wake.wait(_TAKE_OVER_SECONDS)
                    continue
                if not recovered:
                    self.store.mark_interrupted()
                    self._resume_by_itself()
                    recovered = True
                if self.grids.draw_next():
                    continue
                job = self.store.next_queued()
                if job is not None:
                    self._look_ahead(job.id)
                job = self.store.claim(job.id) if job else None
                if job is None:
                    self._wake.wait(_TAKE_OVER_SECONDS)  # a second server may have added one
                else:
                    self._run(job)
                trouble = None
            except Exception as error:  # the disk is full, say: the queue outlives it
                if trouble != repr(error):  # reported once, not every two seconds
                    trouble = repr(error)
                    log.exception("The job queue has trouble; trying again")
                self._wake.wait(_TAKE_OVER_SECONDS)

    def _resume_by_itself(self) -> None:
        """Put the job that was cut off as the last server ended in front, where the settings say so.

        Not one that was paused, and not one that was cut off twice in a row without having saved anything: whatever
        ends the server would do so again and again.
        """
        job = self.store.last_in_hand()
        if job is None or job.status != "interrupted" or not self.host.option(RESUME_OPTION, False):
            return
        cuts = []
        for event in reversed(self.store.events(job.id, limit=_MAX_EVENTS)):
            if event.kind == "saved":
                break
            if (event.kind, event.text) == ("status", "interrupted"):
                cuts.append(event)
        if len(cuts) < 2 and all(event.data.get("from") != "paused" for event in cuts):
            try:
                self.resume(job.id)
            except UserError as error:
                self.store.update(job.id, error=Problem.of(error))

    def _look_ahead(self, next_id: int) -> None:
        """What would stop the jobs behind the next one is said in the queue, not only when their turn comes."""
        for job in self.store.jobs(("queued",)):
            if job.id == next_id:
                continue
            problem = None
            try:
                check_base(self.effective_config(job), self.host)
            except UserError as error:
                problem = Problem.of(error)
            except Exception:  # the host's code; whatever it is, the job's own turn shows it
                log.warning("Job %s could not be looked at ahead of its turn", job.id, exc_info=True)
            if problem != job.error:
                self.store.update(job.id, error=problem)

    def _own_queue(self) -> bool:
        try:
            held = self.lease.acquire()
        except UserError as error:
            self.trouble = Problem.of(error)
            return False
        self.trouble = None if held else self._elsewhere()
        return held

    def _elsewhere(self) -> Problem:
        owner = self.lease.owner()
        who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another server"
        return Problem(
            f"Another WebUI ({who}) trains the jobs of this folder.",
            remedy="Use that one, or give each its own --lora-trainer-dir. Jobs added here wait in the same queue.",
        )

    def _run(self, job: Job) -> None:
        running = _Running(job.id, TrainCommands())
        output = self.folders.output(job)
        running.reporter = reporter = JobReporter(self.store, job.id, output, running.status)
        with self._lock:
            self._running = running
            if self._closing.is_set():
                running.commands.stop()
        started = time.monotonic()
        try:
            commands, train = running.commands, self._train
            ending = execute(lambda: self.host, self.store, self.folders, job, reporter, commands, train)
        except Exception as error:
            # After the training, or before it: the disk, the queue itself. A job that stayed "running" would never end.
            log.exception("Job %s could not be brought to its end", job.id)
            ending = {"status": "failed", "error": unexpected(error, self.folders.log(job))}
        finally:
            with self._lock:
                self._running = None
        if self._closing.is_set() and ending["status"] == "stopped":
            ending["status"] = "interrupted"
        reporter.flush()
        ending |= {"finished": time.time(), "seconds": job.seconds + time.monotonic() - started}
        self._settle(job.id, {**ending, "active": False, "seconds_left": None, "phase": ""})

    def _settle(self, job_id: int, values: dict[str, Any]) -> None:
        """Write how a job ended, however long the disk stays full."""
        status = values.pop("status")
        while True:
            try:
                self.store.set_status(job_id, status, **values)
                self.trouble = None
                return
            except sqlite3.Error as error:
                log.error("The end of job %s could not be written: %s", job_id, error)
                if disk_is_full(error):
                    self.trouble = full_disk(self.folders.data)
                if self._closing.wait(_TAKE_OVER_SECONDS):
                    return

    # -- what a person can ask for

    def submit(self, settings: Mapping[str, Any] | str, *, held: bool = False, shown: str | None = None) -> Job:
        """Check settings (a mapping or YAML) and append the job; ``held`` jobs are paused until ``start``.

        shown: title of the base model that a person saw where the settings name none; another one is refused.
        """
        config, _ = check_wish(settings, self.host, shown)
        check_data(config, self.host)
        values = submitting.read_settings(settings)
        with self._naming:
            job = submitting.add_job(self.store, self.folders, self.host, values, held=held)
        self._wake.set()
        return job

    def start(self, job_id: int) -> Job:
        """Put a job that waits, was stopped, failed or was interrupted into the queue; it goes on where it was.

        Raises:
            UserError: what would stop it at once.
        """
        job = self.store.get(job_id)
        if job.status == "finished":
            raise UserError(f"{job.name} is finished.", remedy="Run it again with changes, or continue from its LoRA.")
        if not job.active:
            check_run(submitting.stored_config(job), self.host)
            self.store.set_status(job_id, "queued", unless=("queued", "running", "waiting", "stopping"), finished=None)
            self._wake.set()
        elif job.status == "paused":
            return self.resume(job_id)
        return self.store.get(job_id)

    def pause(self, job_id: int) -> Job:
        """Wait after this step, or let others go before a queued job. A job that is paused keeps its place: whoever
        pauses wants the device, so the next job does not take it. To let that one go first, save, stop, and resume
        later."""
        return self._command(job_id, "pause", idle={"queued": "paused"})

    def resume(self, job_id: int) -> Job:
        """Go on after a pause; an interrupted, stopped or failed job goes to the front of the queue."""
        job = self.store.get(job_id)
        if job.active:
            return self._command(job_id, "resume", idle={})
        job = self.start(job_id)
        if job.status == "queued":
            with contextlib.suppress(UserError):  # the worker was faster
                self.store.reorder([job_id])
        return self.store.get(job_id)

    def stop(self, job_id: int) -> Job:
        """End after this step; what was saved before stays. One that was cut off is not offered any more."""
        idle = dict.fromkeys(("queued", "paused", "interrupted"), "stopped")
        return self._command(job_id, "stop", idle=idle)

    def stop_and_save(self, job_id: int) -> Job:
        """End after this step with the LoRA saved; it is published like a finished one."""
        return self._command(job_id, "stop_and_save", idle={})

    def save_now(self, job_id: int) -> Job:
        return self._command(job_id, "save_now", idle={})

    def preview_now(self, job_id: int) -> Job:
        return self._command(job_id, "preview_now", idle={})

    def switch_back(self, job_id: int) -> Job:
        """Have the host choose again what it had chosen when the job began, which waits for it."""
        if not self.can_switch_back(job_id):
            job = self.store.get(job_id)
            message = f"{job.name} does not wait for something that can be switched back."
            raise UserError(message, remedy="Reload the page.")
        return self._command(job_id, "switch_back", idle={})

    def can_switch_back(self, job_id: int) -> bool:
        with self._lock:
            running = self._running
            reporter = running.reporter if running is not None and running.job_id == job_id else None
            return reporter is not None and reporter.waiting and reporter.returns

    def reorder(self, job_ids: Sequence[int]) -> list[Job]:
        """Put these queued jobs first, in this order; returns the queue."""
        self.store.reorder(job_ids)
        return self.store.jobs(("queued",))

    def duplicate(
        self,
        job_id: int,
        changes: Mapping[str, Any] | None = None,
        *,
        held: bool = False,
        shown: str | None = None,
    ) -> Job:
        """The same settings again, with changes and a name that is free."""
        job = self.store.get(job_id)
        changes = dict(changes or {})
        with self._naming:
            changes.setdefault("output_name", submitting.free_name(self.store, self.host, job.name))
            return self.submit(submitting.merged(job, changes), held=held, shown=shown)

    def continue_from(
        self,
        job_id: int,
        changes: Mapping[str, Any] | None = None,
        *,
        held: bool = False,
        shown: str | None = None,
    ) -> Job:
        """A new job that starts from the LoRA this one made."""
        changes = {"init_lora": str(self.result_file(job_id, "lora")), "resume": "auto", **(changes or {})}
        return self.duplicate(job_id, changes, held=held, shown=shown)

    def delete(self, job_id: int, *, confirm: bool = False) -> None:
        """Forget a job and delete its own folder. The published LoRA and the pictures stay."""
        job = self.store.get(job_id)
        if not confirm:
            raise UserError(
                f"Deleting {job.name} removes its settings, states, previews and logs.",
                remedy="Confirm it (confirm: true). The published LoRA and the pictures stay.",
            )
        if job.active:
            raise UserError(f"{job.name} is being trained.", remedy="Stop it first.")
        self.grids.refuse_if_active(job)
        # From here on no worker can take it.
        if not self.store.set_status(job_id, "stopped", unless=("running", "waiting", "stopping")):
            raise UserError(f"{job.name} has just been started.", remedy="Stop it first.")
        try:
            self.folders.remove(job)
        except UserError:
            if job.status != "queued":
                self.store.set_status(job_id, job.status)  # it is still there, and what it was
            raise
        self.store.delete(job_id)

    def compare(self, job_id: int, wish: Wish) -> None:
        """Have a job's LoRAs drawn in a grid, when no training is in hand. Raises UserError when that cannot be."""
        if self._thread is not None and not self.lease.held and self.trouble is not None:
            raise UserError(self.trouble.message, remedy=self.trouble.remedy)
        self.grids.ask(self.store.get(job_id), wish)
        self._wake.set()

    def publish(
        self,
        job_id: int,
        name: str | None = None,
        *,
        step: int | None = None,
        weight: float | None = None,
        overwrite: bool = False,
    ) -> Job:
        """Copy a job's LoRA into the host's LoRA folder, under another name if need be.

        ``step``: the one that was saved at this step. ``weight``: which its card prefers. Without them, those that were
        chosen so before, or the last and the usual weight.
        """
        job = self.store.get(job_id)
        name = check_name(name or job.name, "output_name")
        step = step or job.result.get("chosen_step")
        if step == job.step and job.result.get("lora"):
            step = None
        lora = self.results.file(job, "lora") if step is None else self.results.lora_of(job, step)
        picture = self.results.picture(job, step)
        weight = job.result.get("chosen_weight") if weight is None else check_weight(weight)
        published = job if step is None else replace(job, step=step, loss=None)
        config = self.effective_config(job)
        facts = publish(self.host, published, config, lora, name, picture, weight=weight, overwrite=overwrite)
        facts |= {"published_step": step, "chosen_step": step, "chosen_weight": weight}
        self.store.update(job_id, result={**job.result, **facts})
        self.store.add_event(job_id, "published", name, {})
        return self.store.get(job_id)

    # -- what a person can look at

    def result_file(self, job_id: int, kind: str) -> Path:
        """A file that the job made (``lora``, ``diffusers``). Raises UserError when there is none."""
        return self.results.file(self.store.get(job_id), kind)

    def effective_config(self, job: Job) -> TrainConfig:
        if not job.effective_config:
            job = self.store.get(job.id)  # lists leave the configuration out
        return submitting.stored_config(job)

    def _command(self, job_id: int, name: str, idle: Mapping[str, str]) -> Job:
        """Pass a command to the job in hand, or change the status of one that is not (``idle``: from -> to)."""
        for _ in range(_HAND_OVERS):
            with self._lock:
                running = self._running
                if running is not None and running.job_id == job_id:
                    getattr(running.commands, name)()
                    if name in ("pause", "resume", "stop", "stop_and_save") and running.reporter is not None:
                        running.reporter.refresh_status()
                        self.store.set_status(job_id, running.status(running.reporter.waiting))
                    return self.store.get(job_id)
            job = self.store.get(job_id)
            if not (job.active and self.lease.held):
                break
            time.sleep(_HAND_OVER_SECONDS)  # on its way from the queue into the worker's hand, or from there to its end
        if job.active and not self.lease.held:
            problem = self._elsewhere()
            raise UserError(problem.message, remedy=problem.remedy)
        if not job.active and job.status in idle:
            others = {"queued", "paused", *ACTIVE} - {job.status}
            self.store.set_status(job_id, idle[job.status], unless=others)
            return self.store.get(job_id)
        words = name.replace("_", " ")
        raise UserError(
            f"{job.name} is {job.status}, so there is nothing to {words}.", remedy="Reload the page to see where it is."
        )
