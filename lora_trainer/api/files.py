"""Routes of what a job leaves behind: events, curve, log, previews, files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse

from lora_trainer.api import schemas
from lora_trainer.api.context import Context
from lora_trainer.api.jobs import MAX_ID
from lora_trainer.api.route import new_router
from lora_trainer.errors import UserError
from lora_trainer.jobs.metrics import read_points
from lora_trainer.workspace.paths import confined

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
"""What a browser may show in place; everything else is downloaded."""

_TEXTS = {".log", ".yaml", ".jsonl", ".json", ".txt"}  # may name folders of the server
_MAX_FILES = 5000
_MAX_LOG = 1 << 20


def routes(context: Context) -> APIRouter:
    router = new_router(context, "files")
    manager = context.manager

    def folder_of(job_id: int) -> Path:
        return manager.folders.of(manager.store.get(job_id))

    @router.get("/jobs/{job_id}/events", response_model=schemas.EventListModel)
    def events(
        job_id: int = PathParameter(ge=1, le=MAX_ID),
        since: int = Query(0, ge=0, le=MAX_ID),
        limit: int = Query(500, ge=1, le=5000),
    ) -> dict[str, Any]:
        """What happened after event ``since``, oldest first."""
        manager.store.get(job_id)
        return {"events": [context.event(event) for event in manager.store.events(job_id, since=since, limit=limit)]}

    @router.get("/jobs/{job_id}/metrics", response_model=schemas.MetricsModel)
    def metrics(
        job_id: int = PathParameter(ge=1, le=MAX_ID),
        since: int = Query(0, ge=0, le=MAX_ID),
        limit: int = Query(1000, ge=2, le=20_000),
    ) -> dict[str, Any]:
        """Points of the curve after ``since`` (the offset of the last answer), thinned to ``limit``."""
        points = read_points(manager.folders.metrics(manager.store.get(job_id)), since, limit)
        return {"points": points.points, "offset": points.offset, "follow": points.complete}

    @router.get("/jobs/{job_id}/log", response_model=schemas.LogModel)
    def log(
        job_id: int = PathParameter(ge=1, le=MAX_ID), tail: int = Query(64 << 10, ge=1, le=_MAX_LOG)
    ) -> dict[str, Any]:
        """The last ``tail`` bytes of the job's log."""
        path = manager.folders.log(manager.store.get(job_id))
        try:
            with open(path, "rb") as handle:
                length = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, length - tail))
                text = handle.read(tail).decode("utf-8", "replace")
        except FileNotFoundError:
            return {"text": "", "truncated": False}
        return {"text": context.plain(text), "truncated": length > tail}

    @router.get("/jobs/{job_id}/report", response_class=HTMLResponse)
    def report(
        job_id: int = PathParameter(ge=1, le=MAX_ID), language: str = Query("en", max_length=40)
    ) -> HTMLResponse:
        """The run as one page that needs nothing else and names no place of the server. language: of its words."""
        from lora_trainer.report import RunFolder, report_of  # torch is slow to import

        job = manager.store.get(job_id)
        try:
            folder = RunFolder(manager.folders.of(job))
        except UserError as error:
            raise UserError("This run has not begun, so there is no report.", remedy="Start it first.") from error
        # Captions and names are a person's: whatever they hold, nothing on the page may run or fetch anything.
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
        return HTMLResponse(report_of(folder, language), headers={"Content-Security-Policy": policy})

    @router.get("/jobs/{job_id}/files", response_model=schemas.FileListModel)
    def list_files(job_id: int = PathParameter(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """Every file of the job, for ``/jobs/{id}/files/{path}``."""
        root = folder_of(job_id)
        found = []
        for folder, names, files in os.walk(root):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder) / name
                if not name.startswith(".") and path.is_file() and not path.is_symlink():
                    facts = path.stat()
                    relative = path.relative_to(root).as_posix()
                    found.append({"path": relative, "size": facts.st_size, "changed": facts.st_mtime})
        return {"files": found[:_MAX_FILES]}

    @router.get("/jobs/{job_id}/files/{file:path}", response_class=FileResponse)
    def get_file(file: str, job_id: int = PathParameter(ge=1, le=MAX_ID)) -> Response:
        """One file of the job; pictures are shown, everything else is downloaded."""
        path = confined(folder_of(job_id), file)
        answer = send(path)
        if path.suffix.lower() in _TEXTS and context.host.access().hide_paths:
            text = context.plain(path.read_text(encoding="utf-8", errors="replace"))
            headers = {"Content-Disposition": answer.headers["content-disposition"]}
            return Response(text, media_type="application/octet-stream", headers=headers)
        return answer

    return router


def send(path: Path) -> FileResponse:
    """A file as an answer. Raises UserError when there is none."""
    if not path.is_file() or path.name.startswith("."):
        raise UserError("There is no such file.", remedy="Reload the list of files.")
    media_type = PICTURES.get(path.suffix.lower())
    if media_type:
        return FileResponse(path, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)
