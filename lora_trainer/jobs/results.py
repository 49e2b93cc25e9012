"""What a job has made: its LoRAs, and the pictures that were drawn with them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.jobs.folders import JobFolders
from lora_trainer.jobs.job import Job, UnknownJobError
from lora_trainer.jobs.store import JobStore

_MAX_EVENTS = 100_000  # of one job; the oldest preview of a long run is among them


class JobResults:
    """Reads the jobs' folders; changes nothing."""

    def __init__(self, store: JobStore, folders: JobFolders):
        self._store, self._folders = store, folders
        self._curves: dict[int, Path] = {}

    def output(self, job: Job) -> Path:
        return self._folders.output(job)

    def file(self, job: Job, kind: str) -> Path:
        """A file that the job made (``lora``, ``diffusers``). Raises UserError when there is none."""
        inside = job.result.get(kind)
        path = self._folders.of(job) / inside if inside else None
        if path is None or not path.is_file():
            raise UserError(f"{job.name} has not made a LoRA yet.", remedy="Let it finish, or choose stop and save.")
        return path

    def curve(self, job_id: int) -> Path | None:
        """The job's metrics file, without a look into the database after the first time."""
        path = self._curves.get(job_id)
        if path is None:
            with suppress(UnknownJobError):
                path = self._curves[job_id] = self._folders.metrics(self._store.get(job_id))
        return path

    def loras(self, job: Job) -> dict[int, Path]:
        """The LoRAs that are there, by the step that they were saved at."""
        from lora_trainer.comparison.runs import saved_loras

        return saved_loras(self._folders.output(job), job.name)

    def lora_of(self, job: Job, step: int) -> Path:
        """Raises UserError when none of this step is there."""
        path = self.loras(job).get(step)
        if path is None:
            raise UserError(
                f"{job.name} has no LoRA of step {step}.", field="step", remedy="Choose a step at which it was saved."
            )
        return path

    def picture(self, job: Job, step: int | None = None) -> Path | None:
        """The preview that was drawn at ``step``, or the last before it; None for ``step``: the last of all."""
        folder = self._folders.of(job)
        if step is None:
            inside = job.result.get("thumbnail")
            return folder / inside if inside else None
        drawn = [
            (event.data["step"], event.id, folder / event.data["path"])
            for event in self._store.events(job.id, limit=_MAX_EVENTS)
            if event.kind == "preview" and 0 < event.data.get("step", 0) <= step and event.data.get("path")
        ]
        last = max((at for at, _, _ in drawn), default=0)
        return next((path for at, _, path in drawn if at == last and path.is_file()), None)
