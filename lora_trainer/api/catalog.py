"""Routes of what there is to choose from: presets, base models, settings; and what a choice would take."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Query, Request

from lora_trainer.api import schemas
from lora_trainer.api.context import Context
from lora_trainer.api.route import new_router, while_asked
from lora_trainer.config import TrainConfig, field_docs, from_mapping, to_mapping, to_yaml
from lora_trainer.config.foreign import own_settings, read_what_can_be_read
from lora_trainer.config.names import ALIASES
from lora_trainer.config.schema import GROUPS
from lora_trainer.errors import UserError
from lora_trainer.jobs.estimating import estimate_job
from lora_trainer.jobs.job import ACTIVE
from lora_trainer.jobs.submitting import last_part
from lora_trainer.planning.memory import free_memory
from lora_trainer.planning.presets import PRESETS, preset

_ELSEWHERE = {
    "output_dir": "a training here has a folder of its own; the last part becomes the name, where none is given",
    "cache_dir": "the trainings here share one",
}
"""Settings that the page does not take from a file."""
_OF_THE_WEBUI = {
    "text_encoders": "the WebUI's own are used",
    "base_precision": "the WebUI's weights are used as it holds them",
    "offload_blocks": "the WebUI decides what of its model is on the GPU",
}
"""Settings of a base model that is read from its file, where a WebUI lends it."""


def routes(context: Context) -> APIRouter:
    router = new_router(context, "catalog")

    @router.get("/presets", response_model=schemas.PresetListModel)
    def list_presets(
        pictures: int | None = Query(None, ge=0, le=10_000_000), family: str | None = Query(None, max_length=20)
    ) -> dict[str, Any]:
        """Settings to begin with, adapted to so many pictures, a model of this family (sd1, sd2, sdxl), and the memory
        that is free now."""
        # What a training in hand has taken will be free again when the next one begins.
        free = None if context.manager.store.jobs(ACTIVE) else free_memory(context.host)
        return {
            "presets": [
                {"kind": kind, "task": one.task, "title": one.title, "hint": one.hint,
                 "settings": preset(kind, pictures, family, free)}
                for kind, one in PRESETS.items()
            ]
        }  # fmt: skip

    @router.get("/presets/own", response_model=schemas.OwnPresetListModel)
    def list_own_presets() -> dict[str, Any]:
        """The presets that people saved, by name."""
        rows = [dataclasses.asdict(one) for one in context.presets.presets()]
        return {"presets": [{**row, "problem": context.plain(row["problem"])} for row in rows]}

    @router.post("/presets/own", response_model=schemas.OwnPresetModel, status_code=201)
    def save_preset(new: schemas.NewPresetModel) -> dict[str, Any]:
        """Save settings under a name."""
        return dataclasses.asdict(context.presets.save(new.name, new.kind, new.settings, overwrite=new.overwrite))

    @router.post("/presets/own/{name}/rename", response_model=schemas.NameModel)
    def rename_preset(name: str, new: schemas.NameModel) -> dict[str, Any]:
        context.presets.rename(name, new.name)
        return {"name": new.name}

    @router.delete("/presets/own/{name}", response_model=schemas.ConfirmModel)
    def delete_preset(name: str, confirm: schemas.ConfirmModel) -> dict[str, Any]:
        if not confirm.confirm:
            raise UserError(f"Deleting {name} cannot be undone.", field="confirm", remedy="Confirm it (confirm: true).")
        context.presets.delete(name)
        return {"confirm": True}

    @router.get("/checkpoints", response_model=schemas.CheckpointListModel)
    def list_checkpoints() -> dict[str, Any]:
        """The host's base models; a job names one by its title in ``base_model``, or none for the selected one."""
        rows = [context.checkpoint(one) for one in context.host.checkpoints()]
        return {"checkpoints": rows, "has_one": context.host.name != "standalone"}

    @router.get("/settings", response_model=schemas.SettingListModel)
    def list_settings() -> dict[str, Any]:
        """Every setting with its default and explanation, in the order in which the tab shows them; how many GPUs there
        are for ``gpus``."""
        from lora_trainer.devices import gpu_count  # torch is slow to import

        docs, defaults = field_docs(), to_mapping(TrainConfig())
        rows = [
            {"name": field.name, "group": group, "default": defaults[field.name], "explanation": docs[field.name]}
            for group, kind in GROUPS
            for field in dataclasses.fields(kind)
        ]
        return {"settings": rows, "gpus": gpu_count()}

    @router.post("/settings/check", response_model=schemas.ConfigModel)
    def check(new: schemas.NewJobModel) -> dict[str, Any]:
        """Settings, or text (YAML, or what another trainer writes) -> every setting named, the same as YAML, and what
        became of the other trainer's settings; errors name each field."""
        settings = new.given()
        if isinstance(settings, str):
            given, translation, unread = read_what_can_be_read(settings)
            translation = translation or own_settings(given, settings, _ELSEWHERE)
            if context.host.name != "standalone" and not given.get("gpus"):
                translation.leave_out(_OF_THE_WEBUI)
            given = translation.settings
        else:
            given, translation, unread = settings, None, []
        config = from_mapping(given, unread)
        names = [ALIASES.get(name, name) for name in given]
        if not config.output_name and (name := last_part(config.output_dir)):
            config = dataclasses.replace(config, output_name=name)
            names.append("output_name")
        return {
            "settings": to_mapping(config),
            "given": names,
            "yaml": to_yaml(config),
            "translation": translation and translation.to_json(),
        }

    @router.post("/estimate", response_model=schemas.EstimateModel)
    async def estimate_run(new: schemas.NewJobModel, request: Request) -> dict[str, Any]:
        """Pictures accepted and refused, buckets, steps, minutes and memory of a run with these settings."""
        host, store = context.host, context.manager.store
        facts = await while_asked(request, lambda gone: estimate_job(new.given(), host, store, new.shown, gone))
        facts["refused"] = [
            {"file": context.plain(one["file"]), "reason": context.plain(one["reason"])}
            for one in facts.get("refused", [])
        ]
        facts["warnings"] = [context.plain(text) for text in facts["warnings"]]
        facts["problems"] = [context.problem(problem) for problem in facts.get("problems", [])]
        return facts

    return router
