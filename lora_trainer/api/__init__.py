"""The HTTP interface under ``/lora-trainer/v1``: jobs, datasets, presets, checkpoints, logs.

Kept apart from the host's own API: it is there with and without the tab, and asks for the same credentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lora_trainer.host.base import Host
    from lora_trainer.jobs.worker import JobManager

PREFIX = "/lora-trainer/v1"

__all__ = ["PREFIX", "add_routes"]


def add_routes(app: FastAPI, manager: JobManager, host: Host) -> None:
    """Add every route to the host's app. "Reload UI" makes a new app: call it again with that one."""
    from lora_trainer.api import catalog, comparing, datasets, editor, editor_tools, files, jobs, loras, texts
    from lora_trainer.api.context import Context

    manager.host = host
    context = Context(manager)
    for part in (jobs, comparing, files, datasets, catalog, editor, editor_tools, loras, texts):
        app.router.routes.extend(part.routes(context).routes)
    app.openapi_schema = None  # made anew with these routes when somebody asks
