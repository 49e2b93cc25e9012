"""What goes in and comes out of the routes of pairs."""

from __future__ import annotations

from pydantic import BaseModel

from lora_trainer.api.schemas import PictureModel, UploadModel


class PairPictureModel(BaseModel):
    """place: before or after. dataset: of the pair so far; null begins one. free: the caller sees no picture there, so
    what another has put there meanwhile is not replaced."""

    dataset: str | None = None
    place: str
    picture: UploadModel
    free: bool = False


class PairPromptModel(BaseModel):
    """prompt: what both pictures show."""

    prompt: str


class PairModel(BaseModel):
    """A dataset with the pictures before and after a change, as far as they are there. ``name`` is empty where the one
    that was asked for is no pair."""

    name: str
    before: PictureModel | None = None
    after: PictureModel | None = None
