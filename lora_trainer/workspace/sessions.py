"""Editor sessions: one for each folder that is being edited, with its background task (checking, captioning).

The job manager holds them, so that a page that is loaded again, and "Reload UI", find unsaved changes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import UserError
from lora_trainer.files import safe_name_problem
from lora_trainer.workspace.gallery import Gallery
from lora_trainer.workspace.paths import allowed
from lora_trainer.workspace.tasks import Task

if TYPE_CHECKING:
    from lora_trainer.captioning.registry import Sources
    from lora_trainer.dataset.editing import EditSession
    from lora_trainer.dataset.findings import Report
    from lora_trainer.dataset.links import Links
    from lora_trainer.host.base import Host
    from lora_trainer.run.captioning import CaptionJob


class UnknownSessionError(UserError):
    def __init__(self) -> None:
        super().__init__("This folder is not open any more.", remedy="Open it again.")


class EditorSession:
    """One open folder: its edits, gallery, last report and task."""

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
            task = self.task = Task(kind, raises=kind == "check")
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


class EditorSessions:
    """All open folders of one server."""

    def __init__(self, data: Path, current_host: Callable[[], Host]):
        """data: the data folder. current_host: asked each time, as "Reload UI" exchanges the host."""
        self._data = data
        self._current_host = current_host
        self._open: dict[str, EditorSession] = {}
        self._lock = threading.Lock()
        self._device = threading.Lock()  # one captioner at a time

    def open(self, folder: str, metadata_path: str | None = None, trigger_word: str = "") -> EditorSession:
        """Open a dataset of the library by its name, or a folder by its path; the same folder gives the same
        session, with what is unsaved.

        Raises:
            UserError: there is no such folder, or callers may not name it.
        """
        from lora_trainer.dataset.editing import EditSession
        from lora_trainer.dataset.writing import CaptionFolder

        data, access = self._data, self._current_host().access()
        if safe_name_problem(folder) is None and (data / "datasets" / folder).is_dir():
            folder = str(data / "datasets" / folder)
        root = allowed(folder, data, access, "folder")
        metadata = allowed(metadata_path, data, access, "metadata_path") if metadata_path else None
        identifier = hashlib.sha256(f"{root}\0{metadata}".encode("utf-8", "replace")).hexdigest()[:16]
        with self._lock:
            editor = self._open.get(identifier)
            if editor is None:
                links: Links = "pictures" if access.roots is None else "none"
                edits = EditSession(CaptionFolder(root, metadata, confined=access.roots is not None, links=links))
                editor = self._open[identifier] = EditorSession(identifier, edits, trigger_word)
            elif not editor.busy:
                editor.session.refresh()
        if trigger_word:
            editor.trigger_word = trigger_word
        return editor

    def get(self, identifier: str) -> EditorSession:
        """Raises UnknownSessionError."""
        editor = self._open.get(identifier)
        if editor is None:
            raise UnknownSessionError
        return editor

    def close(self, identifier: str, *, discard: bool = False) -> None:
        """Forget a session. Raises UserError while something is unsaved, unless it may be discarded."""
        editor = self.get(identifier)
        if editor.session.unsaved and not discard:
            count = len(editor.session.unsaved)
            raise UserError(f"{count} changes are not saved.", field="discard", remedy="Save or discard them.")
        if editor.task is not None:
            editor.task.cancel()
        with self._lock:
            self._open.pop(identifier, None)

    def release(self, root: Path) -> None:
        """Forget the sessions of a folder that is about to be moved or deleted. Raises UserError while something in it
        is unsaved or runs."""
        with self._lock:
            there = {key: editor for key, editor in self._open.items() if Path(editor.session.root) == root}
            for editor in there.values():
                _refuse_unsaved(editor, "Save or discard them before the folder is moved or deleted.")
                if editor.busy:
                    raise UserError("Something runs for this folder already.", remedy="Wait for it, or cancel it.")
            for key in there:
                del self._open[key]

    # -- what runs in the background

    def check(self, editor: EditorSession, resolution: int | tuple[int, int] = 512) -> Task:
        """Check what is in the files. Raises UserError while something is unsaved, for the report would not know it."""
        from lora_trainer.dataset.checks import check_folder

        _refuse_unsaved(editor, "Save or discard them before checking.")
        session = editor.session

        def work(task: Task) -> dict[str, Any]:
            revision = session.revision
            report = check_folder(
                session.root, resolution=resolution, trigger_word=editor.trigger_word,
                metadata_path=session.folder.metadata_path, progress=task.progress,
            )  # fmt: skip
            editor.report, editor.report_revision = report, revision
            return {"findings": len(report.findings), "stops_training": report.stops_training}

        return editor.start("check", work)

    def caption(self, editor: EditorSession, make_job: Callable[[EditSession], CaptionJob], sources: Sources) -> Task:
        """Caption pictures on the host's device, batch by batch between the host's own work."""
        from lora_trainer.run.captioning import CaptionCallbacks, caption_folder

        _refuse_unsaved(editor, "Save or discard them before captioning.")
        job = make_job(editor.session)
        job.options.check()
        turn = self._current_host().device_turn

        class Reported(CaptionCallbacks):
            def on_progress(self, done: int, total: int) -> None:
                task_box[0].progress(done, total)

            def on_warning(self, text: str) -> None:
                task_box[0].warn(text)

        task_box: list[Task] = []

        def work(task: Task) -> dict[str, Any]:
            task_box.append(task)
            with self._device:
                result = caption_folder(job, sources, callbacks=Reported(), cancelled=lambda: task.cancelled, turn=turn)
            return {
                "captioner": result.captioner,
                "written": result.written,
                "kept": result.kept,
                "skipped": [{"file": key, "reason": reason} for key, reason in result.skipped],
                "cancelled": result.cancelled,
            }

        return editor.start("caption", work)


def _refuse_unsaved(editor: EditorSession, remedy: str) -> None:
    if count := len(editor.session.unsaved):
        raise UserError(f"{count} changes are not saved.", remedy=remedy)
