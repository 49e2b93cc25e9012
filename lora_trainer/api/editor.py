"""Routes of the dataset editor: a folder is opened, its captions and pictures are changed, undone, saved."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from lora_trainer.api import editor_schemas as schemas
from lora_trainer.api.context import Context
from lora_trainer.api.files import send
from lora_trainer.api.route import new_router
from lora_trainer.errors import UserError
from lora_trainer.workspace.gallery import Filter
from lora_trainer.workspace.paths import confined
from lora_trainer.workspace.sessions import EditorSession, EditorSessions
from lora_trainer.workspace.tasks import Task

PAGE = 200
"""Pictures that an answer holds at most."""

THUMBNAILS_SECONDS = 0.15
"""How long an answer with thumbnails is waited for."""


def routes(context: Context) -> APIRouter:
    router = new_router(context, "editor")
    sessions = context.manager.sessions
    views = Views(context)

    @router.post("/editor", response_model=schemas.EditorModel)
    def open_folder(new: schemas.OpenModel) -> dict[str, Any]:
        """Open a folder, or find it with everything that is not saved yet."""
        return views.state(sessions.open(new.folder, new.metadata_path or None, new.trigger_word.strip()))

    @router.get("/editor/{session}", response_model=schemas.EditorModel)
    def get_state(session: str) -> dict[str, Any]:
        """Where the session stands, with the progress of its task."""
        return views.state(sessions.get(session))

    @router.post("/editor/{session}/close", response_model=schemas.FilesModel)
    def close(session: str, discard: bool = False) -> dict[str, Any]:
        """Forget the session; ``discard=true`` with what is unsaved."""
        sessions.close(session, discard=discard)
        return {"files": []}

    @router.post("/editor/{session}/pictures", response_model=schemas.PageModel)
    def page(
        session: str,
        wanted: schemas.FilterModel,
        offset: int = Query(0, ge=0, le=10_000_000),
        limit: int = Query(50, ge=1, le=PAGE),
    ) -> dict[str, Any]:
        """A page of the pictures that pass the filter, in order of their names."""
        editor = sessions.get(session)
        keys = editor.gallery.keys(_filter(wanted), editor.problems())
        rows = views.rows(editor, keys[offset : offset + limit])
        return {"total": len(keys), "offset": offset, "rows": rows, "state": views.state(editor)}

    @router.post("/editor/{session}/keys", response_model=schemas.FilesModel)
    def keys(session: str, wanted: schemas.FilterModel) -> dict[str, Any]:
        """The names of all pictures that pass the filter."""
        editor = sessions.get(session)
        return {"files": editor.gallery.keys(_filter(wanted), editor.problems())}

    @router.get("/editor/{session}/thumbnails/{file:path}", response_class=FileResponse)
    def thumbnail(session: str, file: str) -> FileResponse:
        """The picture, turned and cropped as it is now, as a JPEG of at most 256 pixels a side."""
        editor = sessions.get(session)
        path = _picture(editor, file)
        return send(context.library.thumbnails.get(path, _edit(editor, file)))

    @router.post("/editor/{session}/thumbnails", response_model=schemas.ThumbnailsModel)
    def thumbnails(session: str, wanted: schemas.FilesModel) -> dict[str, Any]:
        """Several in one answer, as ``data:`` URLs by file: those that are there, and what can be made of the others
        within ``THUMBNAILS_SECONDS``; at least the first. Empty for what cannot be read."""
        editor = sessions.get(session)
        until = time.monotonic() + THUMBNAILS_SECONDS
        made: dict[str, str] = {}
        for file in wanted.files[:PAGE]:
            if made and time.monotonic() > until:
                break
            made[file] = _thumbnail_url(context, editor, file)
        return {"pictures": made}

    @router.get("/editor/{session}/pictures/{file:path}", response_class=FileResponse)
    def image(session: str, file: str) -> FileResponse:
        """The picture's own file."""
        return send(_picture(sessions.get(session), file))

    @router.post("/editor/{session}/edit", response_model=schemas.ChangedModel)
    def edit(session: str, change: schemas.EditModel) -> dict[str, Any]:
        """Change captions of one or many pictures as one step."""
        from lora_trainer.dataset.edits import Edit

        editor = _free(sessions.get(session))
        if change.files is None and change.filter is None:
            raise UserError("No picture is named.", field="files", remedy="Send files or a filter.")
        keys = change.files
        if keys is None:
            keys = editor.gallery.keys(_filter(change.filter), editor.problems())
        wish = Edit(
            change.kind, change.value, tuple(change.tags), change.place, change.pattern, change.ignore_case  # type: ignore[arg-type]
        )
        return views.changed(editor, editor.session.edit(wish, keys))

    @router.post("/editor/{session}/captions", response_model=schemas.ChangedModel)
    def set_captions(session: str, new: schemas.SetModel) -> dict[str, Any]:
        """Give pictures these captions as one step."""
        editor = _free(sessions.get(session))
        return views.changed(editor, editor.session.set_captions(new.captions))

    @router.post("/editor/{session}/pictures/edit", response_model=schemas.ChangedModel)
    def edit_pictures(session: str, change: schemas.PicturesEditModel) -> dict[str, Any]:
        """Exclude, turn or crop pictures as one step; their files stay as they are."""
        editor = _free(sessions.get(session))
        values: dict[str, Any] = {}
        if change.excluded is not None:
            values["excluded"] = change.excluded
        if change.rotate is not None:
            values["rotate"] = change.rotate % 360
        if change.crop is not None:
            if len(change.crop) != 4:
                raise UserError("A crop has four numbers.", field="crop", remedy="Left, top, right and bottom, 0 to 1.")
            values["crop"] = tuple(change.crop)
        elif change.clear_crop:
            values["crop"] = None
        known = editor.session.pictures
        unknown = next((key for key in change.files if key not in known), None)
        if unknown is not None:
            raise UserError(f"There is no picture {unknown!r} here.", field="files", remedy="Reload the folder.")
        edits = {key: dataclasses.replace(known[key], **values) for key in change.files}
        label = " and ".join(values) or "pictures"
        return views.changed(editor, editor.session.edit_pictures(edits, label))

    @router.post("/editor/{session}/undo", response_model=schemas.ChangedModel)
    def undo(session: str) -> dict[str, Any]:
        editor = _free(sessions.get(session))
        return views.changed(editor, editor.session.undo())

    @router.post("/editor/{session}/redo", response_model=schemas.ChangedModel)
    def redo(session: str) -> dict[str, Any]:
        editor = _free(sessions.get(session))
        return views.changed(editor, editor.session.redo())

    @router.post("/editor/{session}/save", response_model=schemas.SavedModel)
    def save(session: str, wish: schemas.SaveModel) -> dict[str, Any]:
        """Write what is unsaved. A caption that somebody else changed meanwhile is reported as a conflict."""
        from lora_trainer.dataset.writing import ConflictError

        editor = _free(sessions.get(session))
        try:
            written = editor.session.save(force=wish.force)
        except ConflictError as error:
            conflicts = [
                {"file": key, "yours": context.plain(editor.session.captions[key]), "theirs": context.plain(text)}
                for key, text in sorted(error.current.items())
            ]
            return {"saved": False, "conflicts": conflicts, "state": views.state(editor)}
        return {"saved": True, "files": len(written.files), "backup": written.backup, "state": views.state(editor)}

    @router.post("/editor/{session}/theirs", response_model=schemas.ChangedModel)
    def take_theirs(session: str, wish: schemas.FilesModel) -> dict[str, Any]:
        """End a conflict: these captions become what is in the files."""
        editor = _free(sessions.get(session))
        return views.changed(editor, editor.session.take_theirs(wish.files))

    @router.post("/editor/{session}/discard", response_model=schemas.EditorModel)
    def discard(session: str) -> dict[str, Any]:
        """Forget everything unsaved and read the files again."""
        editor = _free(sessions.get(session))
        editor.session.discard()
        return views.state(editor)

    @router.post("/editor/{session}/refresh", response_model=schemas.SavedModel)
    def refresh(session: str) -> dict[str, Any]:
        """Take over what changed in the files; reports conflicts with what is unsaved."""
        editor = _free(sessions.get(session))
        conflict = editor.session.refresh()
        rows = [
            {"file": key, "yours": context.plain(editor.session.captions[key]), "theirs": context.plain(text)}
            for key, text in sorted(conflict.current.items() if conflict else ())
        ]
        return {"saved": False, "conflicts": rows, "state": views.state(editor)}

    return router


class Views:
    """Sessions as the API shows them."""

    def __init__(self, context: Context):
        self._context = context

    def state(self, editor: EditorSession) -> dict[str, Any]:
        session = editor.session
        with session.lock:
            return {
                "id": editor.id,
                "name": self._context.place(str(session.root)),
                "pictures": len(session.paths),
                "captioned": sum(bool(text) for text in session.captions.values()),
                "excluded": sum(edit.excluded for edit in session.pictures.values()),
                "revision": session.revision,
                "unsaved": len(session.unsaved),
                "undo": session.undo_label,
                "redo": session.redo_label,
                "trigger_word": editor.trigger_word,
                "caption_problems": [self._context.plain(str(one)) for one in session.problems[:PAGE]],
                "task": self.task(editor.task),
                "has_report": editor.report is not None,
                "report_stale": editor.report is not None and editor.report_revision != session.revision,
            }

    def task(self, task: Task | None) -> dict[str, Any] | None:
        if task is None:
            return None
        return {
            "kind": task.kind,
            "status": task.status,
            "done": task.done,
            "total": task.total,
            "error": self._context.problem(task.error),
            "warnings": [self._context.plain(text) for text in task.warnings],
            "result": task.result,
        }

    def rows(self, editor: EditorSession, keys: Iterable[str]) -> list[dict[str, Any]]:
        session, problems = editor.session, editor.problems()
        rows = []
        with session.lock:
            unsaved = set(session.unsaved)
            for key in keys:
                edit = session.pictures[key]
                rows.append(
                    {
                        "file": key,
                        "caption": self._context.plain(session.captions[key]),
                        "unsaved": key in unsaved,
                        "excluded": edit.excluded,
                        "rotate": edit.rotate,
                        "crop": list(edit.crop) if edit.crop else None,
                        "problems": sorted(problems.get(key, ())),
                        "version": _version(editor, key),
                    }
                )
        return rows

    def changed(self, editor: EditorSession, step: Any) -> dict[str, Any]:
        rows = self.rows(editor, step.keys[:PAGE])
        return {"changed": len(step.keys), "label": step.label, "rows": rows, "state": self.state(editor)}


def _version(editor: EditorSession, key: str) -> str:
    """Changes with the picture and its edit, for the browser's cache."""
    try:
        changed = editor.session.paths[key].stat().st_mtime_ns
    except OSError:
        changed = 0
    edit = editor.session.pictures[key]
    crop = "-".join(f"{share:g}" for share in edit.crop or ())
    return f"{changed:x}-{edit.rotate}-{crop}"


def _picture(editor: EditorSession, file: str) -> Any:
    path = confined(editor.session.root, file)
    if file not in editor.session.paths or not path.is_file():
        raise UserError(f"There is no picture {file!r} here.", remedy="Reload the folder.")
    return path


def _edit(editor: EditorSession, file: str) -> Any:
    """The picture's edit; none for one that was taken out of the folder a moment ago."""
    from lora_trainer.dataset.picture_edits import UNTOUCHED

    return editor.session.pictures.get(file, UNTOUCHED)


def _thumbnail_url(context: Context, editor: EditorSession, file: str) -> str:
    try:
        data = context.library.thumbnails.get(_picture(editor, file), _edit(editor, file)).read_bytes()
    except (UserError, OSError):  # also one that is deleted meanwhile: the others are still to be shown
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _filter(wanted: schemas.FilterModel | None) -> Filter:
    if wanted is None:
        return Filter()
    return Filter(
        wanted.text, tuple(wanted.tags), tuple(wanted.missing), wanted.core, wanted.mood, wanted.problem, wanted.state
    )


def _free(editor: EditorSession) -> EditorSession:
    """Captions are not edited while a captioner writes them."""
    if editor.busy and editor.task is not None and editor.task.kind == "caption":
        raise UserError("The captioner is at work in this folder.", remedy="Wait for it, or cancel it.")
    return editor


def free_session(sessions: EditorSessions, session: str) -> EditorSession:
    return _free(sessions.get(session))
