"""What goes in and comes out of the route of pairs."""

from __future__ import annotations

from pydantic import BaseModel

from lora_trainer.api.schemas import PictureModel, UploadModel


class PairPictureModel(BaseModel):
    """place: before or after. dataset: of the pair so far; null begins one."""

    dataset: str | None = None
    place: str
    picture: UploadModel


class PairModel(BaseModel):
    """A dataset with the pictures before and after a change, as far as they are there. ``name`` is empty where the one
    that was asked for is no pair."""

    name: str
    before: PictureModel | None = None
    after: PictureModel | None = None
