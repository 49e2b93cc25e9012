"""Comparisons that persons ask for: drawn by the worker's thread, so never while it trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.errors import UserError, concerning
from lora_trainer.jobs.execution import drawing_options
from lora_trainer.jobs.job import ACTIVE, Job
from lora_trainer.jobs.results import JobResults
from lora_trainer.jobs.store import JobStore
from lora_trainer.workspace.tasks import Task

if TYPE_CHECKING:
    from lora_trainer.comparison.plan import Plan, Wish
    from lora_trainer.config import TrainConfig
    from lora_trainer.host.base import Host, LenderOptions


@dataclass(frozen=True)
class _Asked:
    job_id: int
    output: Path
    plan: Plan
    options: LenderOptions
    task: Task


class Grids:
    """One comparison of each job at a time; the queue of them is in memory, what was drawn is on the disk."""

    def __init__(
        self,
        current_host: Callable[[], Host],
        store: JobStore,
        results: JobResults,
        config_of: Callable[[Job], TrainConfig],
    ):
        """current_host: asked each time, as "Reload UI" exchanges the host."""
        self._current_host, self._store, self._results, self._config_of = current_host, store, results, config_of
        self._lock = threading.Lock()
        self._queue: list[_Asked] = []
        self._tasks: dict[int, Task] = {}  # the last one of each job

    def ask(self, job: Job, wish: Wish) -> None:
        """Have the job's LoRAs compared, after the training in hand and before the next one.

        Raises:
            UserError: it cannot be drawn, naming the field; or one of this job is asked for already.
        """
        from lora_trainer.comparison.plan import make_plan

        host, config = self._current_host(), self._config_of(job)
        if config.task == "text":
            raise UserError(f"{job.name} taught a language model.", remedy="A grid shows pictures.")
        options = drawing_options(host, config)
        with concerning("base_model"):
            info = host.lender(config.base_model, options).describe()
        recommended = job.result.get("recommended_step")
        plan = make_plan(config, self._results.loras(job), info, wish, recommended)
        task = Task("compare", status="waiting", raises=False)
        task.total = len(plan.cells)
        with self._lock:
            self.refuse_if_active(job)
            self._tasks[job.id] = task
            self._queue.append(_Asked(job.id, self._results.output(job), plan, options, task))

    def task(self, job: Job) -> Task | None:
        """The last one that was asked for since the server's start."""
        return self._tasks.get(job.id)

    def waits_for(self) -> str | None:
        """The name of the training that a waiting comparison waits for."""
        return next((one.name for one in self._store.jobs(ACTIVE)), None)

    def stop(self, job: Job) -> None:
        """After the picture in hand; what was drawn stays."""
        with self._lock:
            task = self._tasks.get(job.id)
            if task is None or not task.active:
                raise UserError(f"No grid of {job.name} is being drawn.", remedy="Reload the page.")
            task.cancel()
            if task.status == "waiting":
                self._queue = [one for one in self._queue if one.task is not task]
                task.status = "cancelled"

    def refuse_if_active(self, job: Job) -> None:
        """Raises UserError while a comparison of the job waits or is drawn."""
        task = self._tasks.get(job.id)
        if task is not None and task.active:
            raise UserError(f"A grid of {job.name} is being drawn.", remedy="Wait for it, or stop it.")

    def close(self) -> None:
        """End after the picture in hand."""
        with self._lock:
            self._queue.clear()
            for task in self._tasks.values():
                if task.active:
                    task.cancel()

    def draw_next(self) -> bool:
        """Draw the one that was asked for first, in the worker's thread; False where none waits."""
        with self._lock:
            if not self._queue:
                return False
            asked = self._queue.pop(0)
            asked.task.status = "running"
        asked.task.run(lambda task: self._draw(asked))
        return True

    def _draw(self, asked: _Asked) -> dict[str, Any]:
        from lora_trainer.comparison.drawing import draw

        task = asked.task
        made = draw(
            self._current_host(),
            asked.plan,
            asked.output,
            asked.options,
            on_progress=task.progress,
            stopped=lambda: task.cancelled,
        )
        return {"folder": made and made.name, "cancelled": task.cancelled and task.done < task.total}
