"""Routes of the queue: jobs, their commands, and the one route that pages poll."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Path, Query

from lora_trainer.api import schemas
from lora_trainer.api.context import Context
from lora_trainer.api.route import new_router
from lora_trainer.errors import Problem, UserError
from lora_trainer.jobs.comparing import differences
from lora_trainer.jobs.job import STATUSES, Job
from lora_trainer.jobs.status import look
from lora_trainer.jobs.store import ORDERS

MAX_ID = 2**53

COMMANDS = {
    "start": "Put a paused, stopped, failed or interrupted job into the queue; it goes on from its last state.",
    "pause": "Wait after this step, with the device free for pictures: jobs behind it wait too, until it is resumed or "
    "stopped. Or let others go before a queued job.",
    "resume": "Go on after a pause; an interrupted, stopped or failed job goes to the front of the queue.",
    "stop": "End after this step; what was saved before stays. One that was interrupted is not offered any more.",
    "stop-and-save": "End after this step with the LoRA saved and published.",
    "save-now": "Save the LoRA and the state after this step.",
    "preview-now": "Draw the previews after this step.",
    "switch-back": "Have the WebUI choose again what it had chosen when the job began, which waits for it.",
}


def routes(context: Context) -> APIRouter:
    router = new_router(context, "jobs")
    manager = context.manager

    @router.get("/status", response_model=schemas.StatusModel)
    def status(since: str | None = Query(None, max_length=200)) -> dict[str, Any]:
        """What changed since the last look: made for polling, cheap when nothing did."""
        snapshot = look(manager, since)
        points = snapshot.metrics
        return {
            "cursor": snapshot.cursor,
            "unchanged": snapshot.unchanged,
            "running": context.job(snapshot.running) if snapshot.running else None,
            "queue": [context.job(job) for job in snapshot.queue],
            "changed": [context.job(job) for job in snapshot.changed],
            "base": context.checkpoint(snapshot.base),
            "interrupted": [context.job(job) for job in snapshot.interrupted],
            "metrics_job": snapshot.metrics_job,
            "points": points.points if points else [],
            "points_follow": points.complete if points else True,
            "events": [context.event(event) for event in snapshot.events],
            "counts": snapshot.counts or {},
            "trouble": context.problem(snapshot.trouble),
        }

    @router.get("/jobs", response_model=schemas.JobListModel)
    def list_jobs(
        status: str | None = Query(None, max_length=40),
        limit: int = Query(1000, ge=1, le=5000),
        offset: int = Query(0, ge=0, le=MAX_ID),
        search: str = Query("", max_length=200),
        order: str = Query("newest", max_length=40),
    ) -> dict[str, Any]:
        """What runs, then the queue in its order, then what is paused, then the others in ``order``. search: words that
        stand in the name, base model or data set."""
        if order not in ORDERS:
            raise UserError(f"There is no order {order!r}.", field="order", remedy=f"One of {', '.join(ORDERS)}.")
        if status is not None and status not in STATUSES:
            raise UserError(f"There is no status {status!r}.", field="status", remedy=f"One of {', '.join(STATUSES)}.")
        chosen = (status,) if status else None
        jobs = manager.store.jobs(chosen, limit=limit, offset=offset, search=search, order=order)
        return _list(context, jobs, manager.store.count(chosen, search=search))

    @router.post("/jobs/delete", response_model=schemas.DeletedModel)
    def delete_many(wish: schemas.JobsModel) -> dict[str, Any]:
        """Delete several jobs, each with its own folder. Published LoRAs and pictures stay."""
        deleted, refused = [], []
        for job_id in dict.fromkeys(wish.jobs):
            try:
                manager.delete(job_id, confirm=wish.confirm)
                deleted.append(job_id)
            except UserError as error:
                refused.append(context.problem(Problem.of(error)))
        return {"deleted": deleted, "refused": refused}

    @router.get("/jobs/{job_id}/differences/{other_id}", response_model=schemas.DifferencesModel)
    def compare(job_id: int = Path(ge=1, le=MAX_ID), other_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """The settings in which two jobs differ."""
        found = differences(manager.store.get(job_id), manager.store.get(other_id))
        rows = [{"name": it.name, "one": shown(it.name, it.one), "other": shown(it.name, it.other)} for it in found]
        return {"differences": rows}

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [shown("", one) for one in value]
        if not isinstance(value, str):
            return value
        return context.place(value) if name == "train_data_dir" else context.plain(value)

    @router.post("/jobs", response_model=schemas.JobDetailModel, status_code=201)
    def submit(new: schemas.NewJobModel) -> dict[str, Any]:
        """Check the settings and append a job to the queue."""
        return context.job(manager.submit(new.given(), held=new.held, shown=new.shown), detailed=True)

    @router.post("/jobs/reorder", response_model=schemas.JobListModel)
    def reorder(order: schemas.OrderModel) -> dict[str, Any]:
        """Put queued jobs first, in the given order."""
        jobs = manager.reorder(order.jobs)
        return _list(context, jobs, len(jobs))

    @router.get("/jobs/{job_id}", response_model=schemas.JobDetailModel)
    def get_job(job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        return context.job(manager.store.get(job_id), detailed=True)

    @router.delete("/jobs/{job_id}", status_code=200, response_model=schemas.ConfirmModel)
    def delete(confirm: schemas.ConfirmModel, job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """Delete the job and its own folder. The published LoRA and the pictures stay."""
        manager.delete(job_id, confirm=confirm.confirm)
        return {"confirm": True}

    @router.post("/jobs/{job_id}/duplicate", response_model=schemas.JobDetailModel, status_code=201)
    def duplicate(changes: schemas.ChangesModel, job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """The same settings once more, with changes, under a name that is free."""
        job = manager.duplicate(job_id, changes.changes, held=changes.held, shown=changes.shown)
        return context.job(job, detailed=True)

    @router.post("/jobs/{job_id}/continue", response_model=schemas.JobDetailModel, status_code=201)
    def continue_from(changes: schemas.ChangesModel, job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """A new job that starts from the LoRA that this one made."""
        job = manager.continue_from(job_id, changes.changes, held=changes.held, shown=changes.shown)
        return context.job(job, detailed=True)

    @router.post("/jobs/{job_id}/publish", response_model=schemas.JobDetailModel)
    def publish(options: schemas.PublishModel, job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """Copy the job's LoRA into the host's LoRA folder, with its card."""
        step, weight, overwrite = options.step, options.weight, options.overwrite
        job = manager.publish(job_id, options.name, step=step, weight=weight, overwrite=overwrite)
        return context.job(job, detailed=True)

    for command, explanation in COMMANDS.items():
        _add_command(router, context, command, explanation)
    return router


def _list(context: Context, jobs: Sequence[Job], total: int) -> dict[str, Any]:
    return {"jobs": [context.job(job) for job in jobs], "counts": context.manager.store.counts(), "total": total}


def _add_command(router: APIRouter, context: Context, command: str, explanation: str) -> None:
    act = getattr(context.manager, command.replace("-", "_"))

    def obey(job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        return context.job(act(job_id), detailed=True)

    router.add_api_route(
        f"/jobs/{{job_id}}/{command}",
        obey,
        methods=["POST"],
        response_model=schemas.JobDetailModel,
        name=command,
        description=explanation,
    )
