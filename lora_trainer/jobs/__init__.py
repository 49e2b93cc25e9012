"""Jobs belong to the server: a queue on disk, one worker thread, and everything a page needs to find them again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_trainer.host.base import Host
    from lora_trainer.jobs.worker import JobManager

__all__ = ["manager"]

_managers: dict[Path, JobManager] = {}
_lock = threading.Lock()


def manager(host: Host) -> JobManager:
    """The one manager of the host's data folder, its worker running.

    "Reload UI" calls this again with a new host object: the manager and the job in its hands stay, the next job uses
    the new host.

    Raises:
        UserError: the queue was written by a newer version, or the folder cannot be used.
    """
    from lora_trainer.jobs.worker import JobManager

    folder = Path(host.folders().data).resolve()
    with _lock:
        found = _managers.get(folder)
        if found is None:
            found = _managers[folder] = JobManager(host, folder)
        found.host = host
    found.start_worker()
    return found
