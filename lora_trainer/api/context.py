"""What the routes share: the manager, its host, and what of it may be shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_trainer.errors import Problem
from lora_trainer.jobs.job import Event, Job
from lora_trainer.models.families.causal_lm.families import LANGUAGE_FAMILIES
from lora_trainer.workspace.library import DatasetLibrary
from lora_trainer.workspace.paths import redact
from lora_trainer.workspace.presets import OwnPresets

if TYPE_CHECKING:
    from lora_trainer.host.base import Checkpoint, Host
    from lora_trainer.jobs.worker import JobManager

_INTERNAL = {"folder", "config", "effective_config", "result", "timings", "warnings", "error"}

_RESUMED = ("interrupted", "stopped", "failed")

Text = TypeVar("Text", str, "str | None")


class Context:
    """``manager.host`` is asked anew each time: "Reload UI" exchanges it."""

    def __init__(self, manager: JobManager):
        self.manager = manager
        self.library = DatasetLibrary(manager.folders.data)
        self.presets = OwnPresets(manager.folders.data)

    @property
    def host(self) -> Host:
        return self.manager.host

    def plain(self, text: Text) -> Text:
        """Text as it may be sent: valid Unicode, without the server's folders where those are hidden."""
        if text is None:
            return None
        if self.host.access().hide_paths:
            folders = self.host.folders()
            text = redact(text, self.manager.folders.data, folders.lora, folders.language_models)
        return text.encode("utf-8", "replace").decode("utf-8")

    def problem(self, problem: Problem | None) -> dict[str, Any] | None:
        return {key: self.plain(text) for key, text in problem.to_dict().items()} if problem else None

    def job(self, job: Job, *, detailed: bool = False) -> dict[str, Any]:
        """A job as the API shows it; ``detailed`` with its configurations."""
        values = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in _INTERNAL}
        published = job.result.get("published")
        values |= {
            "dataset": self.place(job.dataset),
            "phase": self.plain(job.phase),
            "error": self.problem(job.error),
            "warnings": [self.problem(warning) for warning in job.warnings],
            "lora": job.result.get("lora"),
            "diffusers": job.result.get("diffusers"),
            "thumbnail": job.result.get("thumbnail"),
            "published": Path(published).stem if published else None,
            "published_step": job.result.get("published_step"),
            "chosen_weight": job.result.get("chosen_weight"),
            "recommended_step": job.result.get("recommended_step"),
            "advice": job.result.get("advice") or "",
            "verified": job.result.get("verified"),
            "switches_back": self.manager.can_switch_back(job.id),
            "fails_again": job.fails_again,
            "task": job.task or ("text" if job.family in LANGUAGE_FAMILIES else "image"),
            "saved_step": self.manager.folders.saved_step(job) if job.status in _RESUMED else None,
        }
        if detailed:
            values |= {"config": self.plain(job.config), "effective_config": self.plain(job.effective_config)}
        return values

    def checkpoint(self, one: Checkpoint | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {"title": self.plain(one.title), "selected": one.selected, "loaded": one.loaded}

    def event(self, event: Event) -> dict[str, Any]:
        values = {field.name: getattr(event, field.name) for field in fields(event)}
        data = {key: self.plain(value) if isinstance(value, str) else value for key, value in event.data.items()}
        return {**values, "text": self.plain(event.text), "data": data}

    def place(self, folder: str) -> str:
        """A folder with pictures as callers name it: a dataset of the library by its name, another by its path."""
        path = Path(folder)
        return path.name if path.parent == self.library.root.resolve() else self.plain(folder)
