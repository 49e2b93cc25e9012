"""What a run says, written to the queue: cheaply, and so that nothing of it is lost."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.config import TrainConfig
from lora_trainer.errors import Problem
from lora_trainer.jobs.store import JobStore
from lora_trainer.planning.duration import Length, to_come
from lora_trainer.planning.memory import memory_in_use
from lora_trainer.processor import Stopwatch
from lora_trainer.training.callbacks import StepReport, TrainCallbacks

if TYPE_CHECKING:
    import torch

MIN_INTERVAL = 0.25
"""Seconds between two writes of a job's progress: four a second are more than an eye follows."""

_PARTS = {
    "captioning": "captioning", "latents": "encoding", "captions": "encoding", "known": "known", "previews": "previews",
    "measuring": "measuring", "hashing": "saving", "saving": "saving", "merging": "ending", "publishing": "ending",
    "verifying": "ending",
}  # fmt: skip
"""Which part of a run the time of a phase belongs to; that of the others is loading."""

_SMOOTHING = 0.1  # weight of the newest step in the speed

log = logging.getLogger(__name__)


class JobReporter(TrainCallbacks):
    """Callbacks of one run. Progress is throttled; events are written as they come.

    A write that fails (the disk is full, say) is logged and does not end the training.
    """

    def __init__(
        self,
        store: JobStore,
        job_id: int,
        output: Path,
        status: Callable[[bool], str],
        clock: Callable[[], float] = time.monotonic,
    ):
        """``status(waiting)`` says which status a run has that is (not) waiting for its model.

        Set later: ``device``, the memory of which is reported; ``config``, which says what is still to be saved and
        drawn; and ``on_lora(path, step)``, which is called with every LoRA that the run saves.
        """
        self._store, self._job_id, self._output, self._status, self._clock = store, job_id, output, status, clock
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        self._written = float("-inf")
        self._phase = ""
        self._last_step: float | None = None
        self._speed: float | None = None
        self._pictures: float | None = None  # a second
        self._watch = Stopwatch()
        self._part = "loading"
        self._stepped = False
        self._timings: dict[str, list[float]] = {"loading": [0.0, 1]}
        self.device: torch.device | None = None
        self.config: TrainConfig | None = None
        self.waiting = False
        self.returns = False  # while it waits: switching back ends it
        self.last_preview: Path | None = None
        self.on_lora: Callable[[Path, int], None] | None = None

    def on_phase(self, name: str, done: int, total: int) -> None:
        self._proceed()
        new = name != self._phase
        self._add(self._part, self._watch.lap())
        self._part = "" if name == "training" else _PARTS.get(name, "loading")
        if new and self._part in ("encoding", "known"):
            self._add(self._part, count=total - done)
        if new and self._part == "measuring":
            self._add("measuring", count=1)
        self._phase = name
        self._last_step = None
        values: dict[str, Any] = {"phase": name, "phase_done": done, "phase_total": total}
        if name == "training":
            values |= {"step": done, "total_steps": total, "phase_done": 0, "phase_total": 0}
        self._note(new or done == total, **values)
        if new:
            self._event("phase", name, {"total": total})

    def on_step(self, report: StepReport) -> None:
        self._proceed()
        now = self._clock()
        # The time between two steps counts, not the step's own: it holds the turns that others took.
        seconds = report.seconds if self._last_step is None else now - self._last_step
        self._last_step = now
        self._watch.lap()
        if self._stepped:
            self._add("training", report.working, report.images)
        else:  # the first one also chooses kernels and fills memory
            self._add("loading", report.working)
        self._part, self._stepped = "", True
        if seconds > 0:
            self._speed = _smoothed(self._speed, 1 / seconds)
            self._pictures = _smoothed(self._pictures, report.images / seconds)
        left = (report.total_steps - report.step) / self._speed + self._beside(report) if self._speed else None
        values: dict[str, Any] = {
            "step": report.step, "total_steps": report.total_steps, "epoch": report.epoch, "speed": self._speed,
            "pictures_per_second": self._pictures, "timings": {**self._timings}, "seconds_left": left,
        }  # fmt: skip
        if report.loss is not None:
            values["loss"] = float(report.loss)
        first = self._phase != "training"
        if first:  # after a wait, or a LoRA that was published
            self._phase = "training"
            values |= {"phase": "training", "phase_done": 0, "phase_total": 0}
        last = report.step >= report.total_steps or self._status(False) != "running"
        self._note(first or last, **values)

    def _beside(self, report: StepReport) -> float:
        """Seconds that coming saves, previews and measurements take, each as those before it."""
        if self.config is None or not report.steps_per_epoch:
            return 0.0
        length = Length(0, 0, report.total_steps, report.steps_per_epoch)
        coming: dict[str, float] = {**to_come(self.config, report.step, length)}
        if measured := self._timings.get("measuring", [0.0, 0])[1]:  # the first of them before any step
            coming["measuring"] = (measured - 1) * (report.total_steps - report.step) / report.step
        seconds = {name: spent / count for name, (spent, count) in self._timings.items() if count}
        return sum(seconds.get(name, 0.0) * count for name, count in coming.items())

    def on_saved(self, path: Path, step: int, kind: str) -> None:
        self._add("saving", self._watch.lap(), int(kind == "lora"))
        self._event("saved", Path(path).name, {"step": step, "kind": kind, "path": self._inside(path)})
        if kind == "lora" and self.on_lora is not None:
            self.on_lora(Path(path), step)
            self._add("saving", self._watch.lap())

    def on_preview(self, path: Path, step: int, prompt: str) -> None:
        self._add("previews", self._watch.lap(), 1)
        self.last_preview = Path(path)
        self._event("preview", prompt, {"step": step, "path": self._inside(path)})

    def on_warning(self, text: str) -> None:
        self.warn(Problem(text))

    def on_waiting(self, reason: str, returns: bool = False) -> None:
        """The model is away, for this reason or, when called again, for another one."""
        self.waiting, self.returns = True, returns
        self._last_step = None
        self._phase = reason
        self._event("waiting", reason, {})
        self._note(True, status=self._status(True), phase=reason)

    def warn(self, problem: Problem) -> None:
        """A warning with its remedy; it stays with the job."""
        log.warning("%s", problem.message)
        self._write(self._store.add_warning, self._job_id, problem)

    def fail(self, problem: Problem) -> None:
        """The event that says why the job failed."""
        self._event("error", problem.message, problem.to_dict())

    def flush(self) -> None:
        """Write what the throttle held back. May be called from any thread."""
        if self._values:
            self._note(True)

    def timings(self) -> dict[str, list[float]]:
        """Seconds and counts of the parts of the run, up to now."""
        self._add(self._part, self._watch.lap(), int(self._part == "ending"))
        return self._timings

    def _add(self, part: str, seconds: float = 0.0, count: float = 0) -> None:
        if part and (seconds or count):
            before = self._timings.setdefault(part, [0.0, 0])
            self._timings[part] = [before[0] + seconds, before[1] + count]

    def refresh_status(self) -> None:
        """Somebody paused, resumed or stopped the run: the next step is timed anew. May be called from any thread."""
        self._last_step = None
        self.flush()

    def _proceed(self) -> None:
        if self.waiting:
            self.waiting = False
            self._watch.lap()  # the model was away: no time of the run's
            self._event("waiting", "The model is back.", {})
            self._phase = ""
            self._note(True, status=self._status(False))

    def _note(self, now: bool, **values: Any) -> None:
        with self._lock:
            self._values |= values
            if not now and self._clock() - self._written < MIN_INTERVAL:
                return
            self._written = self._clock()
            values, self._values = self._values, {}
            if self.device is not None:
                values["memory"] = memory_in_use(self.device)
            status = values.pop("status", None)
            if status is not None:
                self._write(self._store.set_status, self._job_id, status, **values)
            else:
                self._write(self._store.update, self._job_id, **values)

    def _event(self, kind: str, text: str, data: dict[str, Any]) -> None:
        self._write(self._store.add_event, self._job_id, kind, text, data)

    def _write(self, function: Callable[..., Any], *args: Any, **values: Any) -> None:
        try:
            function(*args, **values)
        except sqlite3.Error as error:
            log.warning("Progress of job %s could not be written: %s", self._job_id, error)

    def _inside(self, path: Path) -> str:
        """``path`` relative to the job's folder, as the API names it; its name alone when it lies elsewhere."""
        try:
            return Path(path).resolve().relative_to(self._output.parent.resolve()).as_posix()
        except ValueError:
            return Path(path).name


def _smoothed(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _SMOOTHING * (newest - mean)


@contextmanager
def job_log(path: Path, thread: int) -> Iterator[None]:
    """Everything that the trainer logs in ``thread`` goes to ``path`` as well."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: record.thread == thread)
    logger = logging.getLogger("lora_trainer")
    previous = logger.level
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)
        handler.close()
