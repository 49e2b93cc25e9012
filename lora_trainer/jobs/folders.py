"""The folder that each job has to itself: ``<data>/jobs/<id>-<name>/``."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.jobs.job import Job

_MARK = ".lora-trainer-job"
_STATE = re.compile(r".*-step(\d+)\.state")


class JobFolders:
    """Makes, finds and removes job folders. Inside: config.yaml, output/ (LoRA, logs, state, previews), job.log."""

    def __init__(self, data: Path):
        self.data = Path(data)
        self.jobs = self.data / "jobs"
        self.cache = self.data / "cache"  # shared: encoded pictures are found again by the next run on the same ones
        self.datasets = self.data / "datasets"

    def create(self, job_id: int, name: str) -> Path:
        """A new folder, marked as ours with the job's number, so that nothing else is ever deleted.

        Numbers begin anew with a new list of jobs: a folder that is there belongs to a run of an earlier one.
        """
        stem = f"{job_id:05d}-{_plain(name)}"
        for number in itertools.count(1):
            path = self.jobs / (stem if number == 1 else f"{stem}-{number}")
            try:
                return self._made(path, job_id, exist_ok=False)
            except FileExistsError:
                continue
        raise AssertionError("there is no last number")

    def restore(self, job: Job) -> None:
        """The job's folder as it was made, should somebody have tidied up."""
        self._made(self.of(job), job.id, exist_ok=True)

    def _made(self, path: Path, job_id: int, *, exist_ok: bool) -> Path:
        try:
            path.mkdir(parents=True, exist_ok=exist_ok)
            (path / _MARK).write_text(str(job_id), encoding="ascii")
        except OSError as error:
            if isinstance(error, FileExistsError) and not exist_ok:
                raise
            raise UserError(
                f"The run's folder {path} cannot be made: {error.strerror}.",
                remedy="Free some space, or choose another folder with --lora-trainer-dir.",
            ) from error
        return path

    def of(self, job: Job) -> Path:
        return self.jobs / job.folder

    def output(self, job: Job) -> Path:
        return self.of(job) / "output"

    def log(self, job: Job) -> Path:
        return self.of(job) / "job.log"

    def metrics(self, job: Job) -> Path:
        return self.output(job) / "logs" / "metrics.jsonl"

    def saved_step(self, job: Job) -> int:
        """The step of the newest training state that the job left; 0 where there is none."""
        folder = self.output(job) / "state"
        names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
        return max((int(match[1]) for name in names if (match := _STATE.fullmatch(name))), default=0)

    def remove(self, job: Job) -> None:
        """Delete the job's own folder: never anything that a link leads to, never a folder without our mark."""
        path = self.of(job)
        if not job.folder or path.is_symlink() or path.resolve().parent != self.jobs.resolve() or not path.is_dir():
            return
        try:
            marked = (path / _MARK).read_text(encoding="ascii").strip() == str(job.id)
        except (OSError, UnicodeDecodeError):
            marked = False
        if not marked:
            raise UserError(
                f"{path.name} does not look like the folder of run {job.id}; nothing was deleted.",
                remedy="Look into it, and delete it yourself if nothing in it is needed.",
            )
        try:
            shutil.rmtree(path)  # does not follow links
        except OSError as error:
            raise UserError(
                f"{path.name} could not be deleted completely: {error.strerror}.",
                remedy="Close what uses it, try again.",
            ) from error


def _plain(name: str) -> str:
    """A short form of ``name`` for a folder; the number before it makes it unique."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "lora"
