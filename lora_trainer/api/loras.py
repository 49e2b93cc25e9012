"""Routes of the tools on finished LoRAs. They run in the background, one at a time; ``GET /loras`` says how far."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from pydantic import BaseModel

from lora_trainer.api.context import Context
from lora_trainer.api.files import send
from lora_trainer.api.route import new_router
from lora_trainer.api.schemas import ProblemModel
from lora_trainer.errors import UserError
from lora_trainer.workspace.tasks import Task


class LoraFileModel(BaseModel):
    """name: its path in the LoRA folder, or, of a converted one, its name."""

    name: str
    size: int
    changed: float


class ToolTaskModel(BaseModel):
    """status: running, finished, cancelled or failed. result: ``published``, the name in the LoRA folder, or ``file``,
    to be downloaded; and what was done."""

    kind: str
    status: str
    done: int
    total: int
    error: ProblemModel | None = None
    result: dict[str, Any] = {}


class LoraListModel(BaseModel):
    """converted: files in other programs' layouts, for ``/loras/converted/{name}``. task: the last one."""

    loras: list[LoraFileModel]
    converted: list[LoraFileModel]
    task: ToolTaskModel | None = None


class MetadataModel(BaseModel):
    metadata: dict[str, str]


class _Tool(BaseModel):
    """output: name of the new LoRA. base: title of its base model, needed where that is not a usual one."""

    output: str
    base: str | None = None
    precision: str | None = None


class _Sized(_Tool):
    rank: int | None = None
    share: float | None = None


class ResizeModel(_Sized):
    """rank: of every layer at most. share: of each layer's change to keep, such as 0.95."""

    lora: str


class PartModel(BaseModel):
    name: str
    strength: float = 1.0


class CombineModel(_Sized):
    """Without rank and share the result is exact."""

    loras: list[PartModel]


class ExtractModel(BaseModel):
    """base, tuned: titles of the host's list."""

    base: str
    tuned: str
    output: str
    rank: int = 32
    conv_rank: int = 0
    share: float | None = None
    precision: str = "fp16"


class ConvertModel(_Tool):
    """layout: kohya, diffusers or peft."""

    lora: str
    layout: str


class EditModel(BaseModel):
    """What is left out stays as it is. set, remove: any other entry of the metadata."""

    lora: str
    output: str
    trigger: str | None = None
    title: str | None = None
    description: str | None = None
    set: dict[str, str] = {}
    remove: list[str] = []


class StrengthModel(BaseModel):
    lora: str
    base: str | None = None


def routes(context: Context) -> APIRouter:
    router = new_router(context, "LoRA tools")
    tools = context.manager.lora_tools
    started = {"response_model": ToolTaskModel, "status_code": 202}

    def task(one: Task) -> dict[str, Any]:
        result = {key: context.plain(value) if isinstance(value, str) else value for key, value in one.result.items()}
        return {
            "kind": one.kind, "status": one.status, "done": one.done, "total": one.total,
            "error": context.problem(one.error), "result": result,
        }  # fmt: skip

    @router.get("/loras", response_model=LoraListModel)
    def list_loras() -> dict[str, Any]:
        """The LoRAs of the host's folder."""
        return {
            "loras": _files(tools.loras()),
            "converted": _files(tools.converted()),
            "task": task(tools.task) if tools.task else None,
        }

    @router.get("/loras/metadata", response_model=MetadataModel)
    def metadata(name: str = Query(max_length=1000)) -> dict[str, Any]:
        """What the file of a LoRA says of it."""
        found = tools.metadata(name)
        return {"metadata": {context.plain(key): context.plain(value) for key, value in found.items()}}

    @router.get("/loras/converted/{name}", response_class=FileResponse)
    def download(name: str) -> FileResponse:
        path = tools.converted().get(name)
        if path is None:
            raise UserError("There is no such file.", remedy="Reload the list of files.")
        return send(path)

    @router.post("/loras/resize", **started)
    def resize(wish: ResizeModel) -> dict[str, Any]:
        """Write the best approximation of a lower rank, or of the rank that keeps a share of the change."""
        return task(tools.resize(**dict(wish)))

    @router.post("/loras/combine", **started)
    def combine(wish: CombineModel) -> dict[str, Any]:
        """Write one LoRA that does at weight 1 what several do at theirs."""
        return task(tools.combine(**{**dict(wish), "loras": [(one.name, one.strength) for one in wish.loras]}))

    @router.post("/loras/extract", **started)
    def extract(wish: ExtractModel) -> dict[str, Any]:
        """Write the LoRA that turns one base model into another."""
        return task(tools.extract(**dict(wish)))

    @router.post("/loras/convert", **started)
    def convert(wish: ConvertModel) -> dict[str, Any]:
        """Write a LoRA under the names of another program."""
        return task(tools.convert(**dict(wish)))

    @router.post("/loras/edit", **started)
    def edit(wish: EditModel) -> dict[str, Any]:
        """Write a LoRA with other metadata and the same weights."""
        entries = {"trigger": wish.trigger, "title": wish.title, "description": wish.description}
        return task(tools.edit(wish.lora, wish.output, entries=entries, set=wish.set, remove=wish.remove))

    @router.post("/loras/strength", **started)
    def strength(wish: StrengthModel) -> dict[str, Any]:
        """Measure how strongly each block of the model is changed."""
        return task(tools.strength(**dict(wish)))

    @router.post("/loras/cancel", response_model=LoraListModel)
    def cancel() -> dict[str, Any]:
        """End the task in hand, where it says how far it is; nothing of it stays."""
        if tools.task is not None:
            tools.task.cancel()
        return list_loras()

    return router


def _files(found: Any) -> list[dict[str, Any]]:
    rows = []
    for name, path in found.items():
        try:
            facts = path.stat()
        except OSError:
            continue  # deleted meanwhile
        rows.append({"name": name, "size": facts.st_size, "changed": facts.st_mtime})
    return rows
