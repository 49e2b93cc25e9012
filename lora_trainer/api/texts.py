"""Routes of the rows that language models learn from, and of those models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lora_trainer.api import schemas, text_schemas
from lora_trainer.api.context import Context
from lora_trainer.api.datasets import decode
from lora_trainer.api.route import MAX_UPLOAD, new_router
from lora_trainer.jobs.submitting import check_places
from lora_trainer.workspace.texts import seen, table


def routes(context: Context) -> APIRouter:
    router = new_router(context, "language models")
    uploads = new_router(context, "language models", MAX_UPLOAD)

    @router.get("/language-models", response_model=text_schemas.LanguageModelListModel)
    def list_models() -> dict[str, Any]:
        """The language models of the host's folders; a job names one in ``base_model``, or gives another's folder."""
        return {"names": [context.plain(name) for name in context.host.language_models()]}

    @uploads.post("/texts", response_model=schemas.NewDatasetModel, status_code=201)
    def upload(new: schemas.UploadModel) -> dict[str, Any]:
        """Keep a .jsonl or .json file as a dataset, which jobs name in ``train_data_dir``."""
        return {"name": context.library.add_text(new.name, decode(new))}

    @router.post("/texts/rows", response_model=text_schemas.RowTableModel)
    def rows(wish: text_schemas.RowsModel) -> dict[str, Any]:
        """Fifty rows of ``train_data_dir`` from ``row`` on, each with what is wrong with it."""
        return table(check_places(wish.settings, context.host), wish.row)

    @router.post("/texts/seen", response_model=text_schemas.SeenRowModel)
    def look(wish: text_schemas.RowsModel) -> dict[str, Any]:
        """What the base model sees of one row, in pieces that are learned or not."""
        return seen(check_places(wish.settings, context.host), wish.row)

    router.routes.extend(uploads.routes)
    return router
