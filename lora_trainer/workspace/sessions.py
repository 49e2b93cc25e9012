"""The folders that people edit: one session each, and what runs in the background for it (checking, captioning).

The desk lives in the package like the job queue: a page that is loaded again, and "Reload UI", find the session with
everything that is not saved yet.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import UserError
from lora_trainer.files import safe_name_problem
from lora_trainer.jobs.job import Problem
from lora_trainer.workspace.gallery import Gallery
from lora_trainer.workspace.paths import allowed

if TYPE_CHECKING:
    from lora_trainer.captioning.registry import Sources
    from lora_trainer.dataset.editing import EditSession
    from lora_trainer.dataset.findings import Report
    from lora_trainer.jobs.worker import JobManager
    from lora_trainer.run.captioning import CaptionJob

log = logging.getLogger(__name__)

_MAX_WARNINGS = 50


class UnknownSessionError(UserError):
    def __init__(self) -> None:
        super().__init__("This folder is not open any more.", remedy="Open it again.")


class CancelledError(Exception):
    """Somebody cancelled the task."""


class Task:
    """Something that runs in the background for one folder. status: running, finished, cancelled or failed."""

    def __init__(self, kind: str):
        self.kind = kind
        self.status = "running"
        self.done = self.total = 0
        self.error: Problem | None = None
        self.warnings: list[str] = []
        self.result: dict[str, Any] = {}
        self._cancel = threading.Event()
        self.over = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def cancel(self) -> None:
        """Ask it to end; what it has written stays."""
        self._cancel.set()

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self.cancelled and self.kind == "check":
            raise CancelledError

    def warn(self, text: str) -> None:
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(text)

    def run(self, work: Callable[[Task], Mapping[str, Any]], after: Callable[[], None]) -> None:
        status = "finished"
        try:
            self.result = dict(work(self))
            if self.result.get("cancelled"):
                status = "cancelled"
        except CancelledError:
            status = "cancelled"
        except UserError as error:
            self.error, status = Problem.of(error), "failed"
        except Exception as error:
            # Whatever goes wrong stays with the task, in words: nobody reads a thread's traceback.
            log.exception("%s failed", self.kind)
            problem = Problem(f"Something unexpected happened: {type(error).__name__}: {error}",
                              remedy="The WebUI's console has the details.")  # fmt: skip
            self.error, status = problem, "failed"
        finally:
            try:
                after()
            finally:
                self.status = status
                self.over.set()


class Bench:
    """One open folder: its edit session, gallery, last report and task."""

    def __init__(self, identifier: str, session: EditSession, trigger_word: str):
        self.id = identifier
        self.session = session
        self.trigger_word = trigger_word
        self.gallery = Gallery(session)
        self.task: Task | None = None
        self.report: Report | None = None
        self.report_revision = -1
        self._lock = threading.Lock()
        self._derived: tuple[int, dict[str, Any]] = (-1, {})

    @property
    def busy(self) -> bool:
        return self.task is not None and self.task.status == "running"

    def start(self, kind: str, work: Callable[[Task], Mapping[str, Any]]) -> Task:
        """Run ``work`` in the background. Raises UserError while another task of the folder runs."""
        with self._lock:
            if self.busy:
                raise UserError("Something runs for this folder already.", remedy="Wait for it, or cancel it.")
            task = self.task = Task(kind)
        name = f"lora-trainer-{kind}"
        threading.Thread(target=task.run, args=(work, self._after), name=name, daemon=True).start()
        return task

    def _after(self) -> None:
        self.session.refresh()

    def problems(self) -> dict[str, frozenset[str]]:
        """Picture -> kinds of the last report's findings on it."""
        found: dict[str, set[str]] = {}
        for finding in self.report.findings if self.report else ():
            for key in finding.files or (finding.file,):
                found.setdefault(key, set()).add(finding.kind)
        return {key: frozenset(kinds) for key, kinds in found.items()}

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """Something worked out of the captions, kept until they change."""
        with self.session.lock:
            revision, values = self._derived
            if revision != self.session.revision:
                values = {}
                self._derived = (self.session.revision, values)
            if name not in values:
                values[name] = make()
            return values[name]


class Desk:
    """All open folders of one server."""

    def __init__(self, manager: JobManager):
        self._manager = weakref.ref(manager)
        self._benches: dict[str, Bench] = {}
        self._lock = threading.Lock()
        self._device = threading.Lock()  # one captioner at a time

    @property
    def manager(self) -> JobManager:
        manager = self._manager()
        if manager is None:
            raise UnknownSessionError
        return manager

    def open(self, folder: str, metadata_path: str | None = None, trigger_word: str = "") -> Bench:
        """Open a dataset of the library by its name, or a folder by its path; the same folder gives the same bench,
        with what is unsaved.

        Raises:
            UserError: there is no such folder, or callers may not name it.
        """
        from lora_trainer.dataset.editing import EditSession
        from lora_trainer.dataset.writing import CaptionFolder

        data, access = self.manager.folders.data, self.manager.host.access()
        if safe_name_problem(folder) is None and (data / "datasets" / folder).is_dir():
            folder = str(data / "datasets" / folder)
        root = allowed(folder, data, access, "folder")
        metadata = allowed(metadata_path, data, access, "metadata_path") if metadata_path else None
        identifier = hashlib.sha256(f"{root}\0{metadata}".encode("utf-8", "replace")).hexdigest()[:16]
        with self._lock:
            bench = self._benches.get(identifier)
            if bench is None:
                session = EditSession(CaptionFolder(root, metadata, confined=access.roots is not None))
                bench = self._benches[identifier] = Bench(identifier, session, trigger_word)
            elif not bench.busy:
                bench.session.refresh()
        if trigger_word:
            bench.trigger_word = trigger_word
        return bench

    def get(self, identifier: str) -> Bench:
        """Raises UnknownSessionError."""
        bench = self._benches.get(identifier)
        if bench is None:
            raise UnknownSessionError
        return bench

    def close(self, identifier: str, *, discard: bool = False) -> None:
        """Forget a session. Raises UserError while something is unsaved, unless it may be discarded."""
        bench = self.get(identifier)
        if bench.session.unsaved and not discard:
            count = len(bench.session.unsaved)
            raise UserError(f"{count} changes are not saved.", field="discard", remedy="Save or discard them.")
        if bench.task is not None:
            bench.task.cancel()
        with self._lock:
            self._benches.pop(identifier, None)

    # -- what runs in the background

    def check(self, bench: Bench, resolution: int | tuple[int, int] = 512) -> Task:
        """Check what is in the files. Raises UserError while something is unsaved, for the report would not know it."""
        from lora_trainer.dataset.checks import check_folder

        _refuse_unsaved(bench, "checking")
        session = bench.session

        def work(task: Task) -> dict[str, Any]:
            revision = session.revision
            report = check_folder(
                session.root, resolution=resolution, trigger_word=bench.trigger_word,
                metadata_path=session.folder.metadata_path, progress=task.progress,
            )  # fmt: skip
            bench.report, bench.report_revision = report, revision
            return {"findings": len(report.findings), "stops_training": report.stops_training}

        return bench.start("check", work)

    def caption(self, bench: Bench, make_job: Callable[[EditSession], CaptionJob], sources: Sources) -> Task:
        """Caption pictures on the host's device, batch by batch between the host's own work."""
        from lora_trainer.run.captioning import CaptionCallbacks, caption_folder

        _refuse_unsaved(bench, "captioning")
        job = make_job(bench.session)
        job.options.check()
        turn = getattr(self.manager.host, "device_turn", nullcontext)

        class Told(CaptionCallbacks):
            def on_progress(self, done: int, total: int) -> None:
                task_box[0].progress(done, total)

            def on_warning(self, text: str) -> None:
                task_box[0].warn(text)

        task_box: list[Task] = []

        def work(task: Task) -> dict[str, Any]:
            task_box.append(task)
            with self._device:
                result = caption_folder(job, sources, callbacks=Told(), cancelled=lambda: task.cancelled, turn=turn)
            return {
                "captioner": result.captioner,
                "written": result.written,
                "kept": result.kept,
                "skipped": [{"file": key, "reason": reason} for key, reason in result.skipped],
                "cancelled": result.cancelled,
            }

        return bench.start("caption", work)


_desks: weakref.WeakKeyDictionary[JobManager, Desk] = weakref.WeakKeyDictionary()
_desks_lock = threading.Lock()


def desk_of(manager: JobManager) -> Desk:
    """The one desk of a manager, also after "Reload UI"."""
    with _desks_lock:
        desk = _desks.get(manager)
        if desk is None:
            desk = _desks[manager] = Desk(manager)
        return desk


def _refuse_unsaved(bench: Bench, what: str) -> None:
    if count := len(bench.session.unsaved):
        raise UserError(f"{count} changes are not saved.", remedy=f"Save or discard them before {what}.")
