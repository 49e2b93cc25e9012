"""Routes of the uploaded pictures and their captions."""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from lora_trainer.api import pair_schemas, schemas
from lora_trainer.api.context import Context
from lora_trainer.api.files import send
from lora_trainer.api.route import MAX_UPLOAD, new_router
from lora_trainer.errors import UserError
from lora_trainer.files import disk_is_full
from lora_trainer.jobs.datasets import StoredDatasets
from lora_trainer.workspace.library import Picture, check_caption
from lora_trainer.workspace.pair import pair_in


def routes(context: Context) -> APIRouter:
    router = new_router(context, "datasets")
    uploads = new_router(context, "datasets", MAX_UPLOAD)
    library = context.library
    stored = StoredDatasets(library, context.manager.store, context.manager.sessions)

    def shown(picture: Picture) -> dict[str, Any]:
        return {**asdict(picture), "caption": context.plain(picture.caption)}

    @router.get("/datasets", response_model=schemas.DatasetListModel)
    def list_datasets() -> dict[str, Any]:
        """Every dataset, the one changed last first. A job names it in ``train_data_dir``."""
        resumable = stored.resumable()
        root = library.root.resolve()
        rows = [{**asdict(one), "resumable": resumable.get(str(root / one.name), 0)} for one in library.datasets()]
        return {"datasets": rows}

    @router.post("/datasets", response_model=schemas.PictureListModel, status_code=201)
    def create(new: schemas.NewDatasetModel) -> dict[str, Any]:
        library.create(new.name)
        return {"name": new.name, "pictures": []}

    @router.get("/datasets/{name}", response_model=schemas.PictureListModel)
    def get_dataset(name: str) -> dict[str, Any]:
        """Every picture with its caption."""
        return {"name": name, "pictures": [shown(one) for one in library.pictures(name)]}

    @router.get("/datasets/{name}/pair", response_model=pair_schemas.PairModel)
    def get_pair(name: str) -> dict[str, Any]:
        """The pictures before and after a change, where the dataset holds nothing else."""
        pair = {place: shown(one) for place, one in pair_in(library, name).items()}
        return {"name": name if pair else "", **pair}

    @router.post("/datasets/{name}/pair", response_model=pair_schemas.PairModel)
    def describe_pair(name: str, new: pair_schemas.PairPromptModel) -> dict[str, Any]:
        """Say what both pictures show. What a job learns from, or has learned from, stays: its pictures make another
        dataset with the new words."""
        return get_pair(stored.describe_pair(name, new.prompt))

    @router.delete("/datasets/{name}", response_model=schemas.ConfirmModel)
    def delete(name: str, confirm: schemas.ConfirmModel) -> dict[str, Any]:
        """Delete the dataset with its pictures and captions; only one that was made here."""
        stored.delete(name, confirm=confirm.confirm)
        return {"confirm": True}

    @router.post("/datasets/{name}/rename", response_model=schemas.NewDatasetModel)
    def rename(name: str, new: schemas.NewDatasetModel) -> dict[str, Any]:
        """Give the dataset another name; jobs that use it follow."""
        stored.rename(name, new.name)
        return {"name": new.name}

    @router.get("/datasets/{name}/pictures/{file:path}", response_class=FileResponse)
    def get_picture(name: str, file: str) -> FileResponse:
        return send(library.picture(name, file))

    @router.get("/datasets/{name}/thumbnails/{file:path}", response_class=FileResponse)
    def get_thumbnail(name: str, file: str) -> FileResponse:
        """The picture as a JPEG of at most 256 pixels a side."""
        return send(library.thumbnail(library.picture(name, file)))

    @router.post("/datasets/{name}/captions", response_model=schemas.CaptionsModel)
    def write_captions(name: str, new: schemas.CaptionsModel) -> dict[str, Any]:
        """Replace the captions of these pictures."""
        library.write_captions(name, new.captions)
        return {"captions": new.captions}

    @router.post("/datasets/{name}/exclude", response_model=schemas.ExcludeModel)
    def exclude(name: str, wish: schemas.ExcludeModel) -> dict[str, Any]:
        """Leave pictures out of training, or take them in again; their files stay as they are."""
        library.exclude(name, wish.files, wish.excluded)
        return {"files": wish.files, "excluded": wish.excluded}

    @uploads.post("/datasets/{name}/pictures", response_model=schemas.UploadedModel)
    def upload(name: str, new: schemas.UploadsModel) -> dict[str, Any]:
        """Add pictures. One that cannot be used is refused with the reason; the others are added."""
        library.folder(name)
        added: list[str] = []
        refused: list[dict[str, Any]] = []
        captions: dict[str, str] = {}
        for picture in new.pictures:
            try:
                check_caption(picture.name, picture.caption)
                added.append(library.add_picture(name, picture.name, decode(picture)))
                captions.setdefault(added[-1], picture.caption)
            except UserError as error:
                if error.__cause__ is not None and disk_is_full(error.__cause__):
                    raise
                refused.append(
                    {"message": context.plain(error.message), "field": picture.name[:200], "remedy": error.remedy}
                )
        library.add_captions(name, captions)
        return {"added": added, "refused": refused}

    @uploads.post("/pairs", response_model=pair_schemas.PairModel)
    def put_into_pair(new: pair_schemas.PairPictureModel) -> dict[str, Any]:
        """Put the picture before or after a change into its place. What was trained on stays: another picture in a
        place that is taken makes another dataset."""
        picture = new.picture
        try:
            check_caption(picture.name, picture.caption)
            data = decode(picture)
            name = stored.put_into_pair(new.dataset, new.place, picture.name, data, picture.caption, new.free)
        except UserError as error:
            raise UserError(error.message, field="train_data_dir", remedy=error.remedy) from error
        return get_pair(name)

    router.routes.extend(uploads.routes)
    return router


def decode(picture: schemas.UploadModel) -> bytes:
    encoded = picture.data
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(
            f"{picture.name[:80]} is not base64.", field="pictures", remedy="Send the file's bytes in base64."
        ) from None
