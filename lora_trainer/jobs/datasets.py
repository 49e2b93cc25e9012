"""Renaming and deleting the data sets that are kept here, with regard to the jobs and editors that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.config import FACTS, parse_yaml, with_folder
from lora_trainer.config.names import ALIASES
from lora_trainer.errors import UserError
from lora_trainer.jobs.job import ACTIVE, WAITING_TO_START, Job
from lora_trainer.jobs.store import JobStore
from lora_trainer.workspace.library import DatasetLibrary
from lora_trainer.workspace.pair import describe, is_as_made, pair_in, put
from lora_trainer.workspace.paths import DATASETS
from lora_trainer.workspace.sessions import EditorSessions

RESUMABLE = ("stopped", "failed", "interrupted")


class StoredDatasets:
    """``library``'s data sets as the rest of the server knows them."""

    def __init__(self, library: DatasetLibrary, store: JobStore, sessions: EditorSessions):
        self._library, self._store, self._sessions = library, store, sessions

    def resumable(self) -> dict[str, int]:
        """How many jobs that are over could go on with the pictures of a folder, by its path."""
        found: dict[str, int] = {}
        for job in self._store.jobs(RESUMABLE):
            found[job.dataset] = found.get(job.dataset, 0) + 1
        return found

    def rename(self, name: str, new: str) -> None:
        """Give a data set another name. Jobs that are not running follow, and can be resumed and run again.

        Raises:
            UserError: it is in use, was not made here, or the name is taken.
        """
        old = self._library.own(name)
        self._sessions.release(old)

        def move(jobs: list[Job]) -> Mapping[int, dict[str, Any]]:
            using = [job for job in jobs if _uses(job, old)]
            _refuse_if([job for job in using if job.active], name)
            target = self._library.root.resolve() / new
            changes = {job.id: _moved(job, old, target) for job in using}
            self._library.rename(name, new)
            return changes

        self._store.update_together(move)

    def put_into_pair(
        self, name: str | None, place: str, file: str, data: bytes, caption: str, free: bool = False
    ) -> str:
        """``workspace.pair.put``. A pair that was replaced is deleted where it need not be kept and nobody has touched
        it. free: the caller saw the place empty, so what is there now is another caller's."""

        def change(keep: bool) -> str:
            return put(self._library, name, place, file, data, caption, keep)

        return self._change_pair(name, change, replaces=not free)

    def describe_pair(self, name: str, text: str) -> str:
        """``workspace.pair.describe``."""
        return self._change_pair(name, lambda keep: describe(self._library, name, text, keep), replaces=False)

    def _change_pair(self, name: str | None, change: Callable[[bool], str], replaces: bool) -> str:
        """``change``, told whether the pair is to be kept because it was learned from or will be. Returns the name of
        the dataset. replaces: another dataset takes the place of the old one."""
        library = self._library
        changed: list[str] = []

        def work(jobs: list[Job]) -> Mapping[int, dict[str, Any]]:
            if not name or not pair_in(library, name):
                changed.append(change(False))
                return {}
            old = library.folder(name)
            keep = library.was_learned_from(name) or any(_uses(job, old) for job in jobs)
            changed.append(change(keep))
            if replaces and changed[0] != name and not keep and is_as_made(library, name):
                with suppress(UserError):  # what is open, or was not made here, stays
                    self._sessions.release(old)
                    library.set_aside(name)
            return {}

        self._store.update_together(work)
        with suppress(UserError):
            library.purge()
        return changed[0]

    def delete(self, name: str, *, confirm: bool = False) -> None:
        """Delete a data set with its pictures and captions. LoRAs that were made with them stay.

        Raises:
            UserError: it is not confirmed, in use, or was not made here.
        """
        old = self._library.own(name)
        if not confirm:
            raise UserError(
                f"Deleting {name} removes its pictures and captions from this computer.",
                remedy="Confirm it (confirm: true). LoRAs that were made with them stay.",
            )
        self._sessions.release(old)

        def remove(jobs: list[Job]) -> Mapping[int, dict[str, Any]]:
            _refuse_if([job for job in jobs if job.status in (*WAITING_TO_START, *ACTIVE) and _uses(job, old)], name)
            self._library.set_aside(name)
            return {}

        self._store.update_together(remove)
        self._library.purge()


def _refuse_if(jobs: list[Job], name: str) -> None:
    if jobs:
        raise UserError(
            f"{jobs[0].name} is being trained on {name}, or waits for it.", field="dataset",
            remedy="Stop it, or let it finish.",
        )  # fmt: skip


def _uses(job: Job, folder: Path) -> bool:
    """Whether a setting of the job names the folder, or something in it."""
    if Path(job.dataset) == folder:
        return True
    if folder.name not in job.effective_config:
        return False  # most jobs, and reading their settings takes its time
    settings = parse_yaml(job.effective_config)
    return _with_paths(settings, folder, folder / "another") != settings


def _moved(job: Job, old: Path, new: Path) -> dict[str, Any]:
    """The columns of a job whose data set has moved."""
    given, effective = (_with_paths(parse_yaml(text), old, new) for text in (job.config, job.effective_config))
    return {
        "config": yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000),
        "effective_config": yaml.safe_dump(effective, sort_keys=False, allow_unicode=True, width=1000),
        "dataset": effective.get("train_data_dir", job.dataset),
    }


def _with_paths(settings: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """The settings with ``new`` for ``old`` in every path; a data set may be named without its folder."""

    def moved(text: str) -> str:
        path = Path(text)
        return str(new / path.relative_to(old)) if path == old or old in path.parents else text

    def changed(name: str, value: Any) -> Any:
        facts = FACTS.get(ALIASES.get(name, name))
        if facts is None or facts.path is None:
            return value
        if isinstance(value, list):
            return [with_folder(one, moved) if isinstance(one, str) else one for one in value]
        if not isinstance(value, str):
            return value
        return new.name if value == old.name and ALIASES.get(name, name) in DATASETS else moved(value)

    return {name: changed(name, value) for name, value in settings.items()}
