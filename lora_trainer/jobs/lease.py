"""Which of several servers on one data folder may train: the one that holds the lock."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError


class WorkerLease:
    """An exclusive lock on a file, which the operating system frees when its process ends in whatever way.

    There is nothing to go stale and no clock to trust: a killed server's jobs can be taken over at once, and those of
    a server that merely hangs cannot. The owner's name is in a second file, for messages only.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._owner_file = self.path.with_suffix(".owner.json")
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock if nobody has it; True when it is ours. Raises UserError where files cannot be locked."""
        with self._lock:
            if self._descriptor is not None:
                return True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = _try_lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if not free:
                os.close(descriptor)
                return False
            self._descriptor = descriptor
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            self._owner_file.write_text(json.dumps(owner), encoding="utf-8")
            return True

    def release(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)  # closing frees the lock
                self._descriptor = None

    def owner(self) -> dict[str, Any]:
        """Who had the lock last: ``pid``, ``host``, ``since``; empty when nobody knows."""
        try:
            owner = json.loads(self._owner_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise UserError(
            f"The trainer's folder lies on a file system that cannot lock files ({error.strerror}).",
            remedy="Choose a folder on a local disk with --lora-trainer-dir.",
        ) from error
    return True
