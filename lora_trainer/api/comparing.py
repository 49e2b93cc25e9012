"""Routes of a job's grids: saved steps by weights by prompts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Path

from lora_trainer.api import schemas
from lora_trainer.api.context import Context
from lora_trainer.api.jobs import MAX_ID
from lora_trainer.api.route import new_router
from lora_trainer.comparison.drawing import comparisons
from lora_trainer.comparison.plan import Wish, usual_prompts, usual_weights


def routes(context: Context) -> APIRouter:
    router = new_router(context, "comparisons")
    manager = context.manager

    @router.get("/jobs/{job_id}/compare", response_model=schemas.ComparisonsModel)
    def look(job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """The job's grids, and how far the one is that is being drawn."""
        job = manager.store.get(job_id)
        config = manager.effective_config(job)
        task, output = manager.grids.task(job), manager.results.output(job)
        drawn = [{**one, "folder": f"{output.name}/{one['folder']}"} for one in comparisons(output)]
        return {
            "status": task.status if task else "",
            "done": task.done if task else 0,
            "total": task.total if task else 0,
            "error": context.problem(task.error) if task else None,
            "waits_for": manager.grids.waits_for() if task and task.status == "waiting" else None,
            "steps": list(manager.results.loras(job)),
            "weights": usual_weights(config),
            "prompts": usual_prompts(config),
            "comparisons": drawn,
        }

    @router.post("/jobs/{job_id}/compare", response_model=schemas.ComparisonsModel, status_code=202)
    def compare(wish: schemas.CompareModel, job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """Draw a grid by the host's own sampler, after the training in hand and before the next one."""
        manager.compare(job_id, Wish(wish.steps, wish.weights, wish.prompts))
        return look(job_id)

    @router.post("/jobs/{job_id}/compare/stop", response_model=schemas.ComparisonsModel)
    def stop(job_id: int = Path(ge=1, le=MAX_ID)) -> dict[str, Any]:
        """End after the picture in hand; what was drawn stays."""
        manager.grids.stop(manager.store.get(job_id))
        return look(job_id)

    return router
