"""Work in the background that a page looks at, and can cancel."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from lora_trainer.errors import Problem, UserError

log = logging.getLogger(__name__)

_MAX_WARNINGS = 50


class CancelledError(Exception):
    """Somebody cancelled the task."""


class Task:
    """Something that runs in the background. status: waiting, running, finished, cancelled or failed.

    raises: ``progress`` raises CancelledError once it is cancelled; otherwise the work asks for ``cancelled`` itself.
    """

    def __init__(self, kind: str, *, status: str = "running", raises: bool = True):
        self.kind = kind
        self.status = status
        self._raises = raises
        self.done = self.total = 0
        self.error: Problem | None = None
        self.warnings: list[str] = []
        self.result: dict[str, Any] = {}
        self._cancel = threading.Event()
        self.over = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    @property
    def active(self) -> bool:
        return self.status in ("waiting", "running")

    def cancel(self) -> None:
        """Ask it to end; what it has written stays."""
        self._cancel.set()

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self.cancelled and self._raises:
            raise CancelledError

    def warn(self, text: str) -> None:
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(text)

    def run(self, work: Callable[[Task], Mapping[str, Any]], after: Callable[[], None] = lambda: None) -> None:
        self.status, status = "running", "finished"
        try:
            self.result = dict(work(self))
            if self.result.get("cancelled"):
                status = "cancelled"
        except CancelledError:
            status = "cancelled"
        except UserError as error:
            self.error, status = Problem.of(error), "failed"
        except Exception as error:
            # Whatever goes wrong stays with the task, in words: nobody reads a thread's traceback.
            log.exception("%s failed", self.kind)
            problem = Problem(f"Something unexpected happened: {type(error).__name__}: {error}",
                              remedy="The WebUI's console has the details.")  # fmt: skip
            self.error, status = problem, "failed"
        finally:
            try:
                after()
            finally:
                self.status = status
                self.over.set()
