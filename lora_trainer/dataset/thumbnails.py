"""Small pictures for galleries, kept in a cache so that pages of thousands turn quickly."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from lora_trainer.dataset.images import check_size, flatten, reading, rotate, to_srgb
from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit
from lora_trainer.files import atomic_path

THUMBNAIL_SIDE = 256


def small_picture(picture: Path, edit: PictureEdit, side: int) -> Image.Image:
    """A picture as it is trained, with sides of at most ``side``. Raises UserError for one that cannot be read."""
    with reading(picture) as (image, _):
        check_size(picture, image.size)
        # A large JPEG is decoded at a fraction of its size, which is enough even for a narrow crop of it.
        share = 1.0 if edit.crop is None else min(edit.crop[2] - edit.crop[0], edit.crop[3] - edit.crop[1])
        wanted = round(side / share)
        image.draft(None, (wanted, wanted))
        image.load()
        small = edit.apply(flatten(to_srgb(rotate(image), image.format)))
    small.thumbnail((side, side))
    return small


class ThumbnailCache:
    """JPEGs of at most 256 pixels a side under ``folder``; one per version of a picture and of its edit."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def get(self, picture: Path, edit: PictureEdit = UNTOUCHED) -> Path:
        """The thumbnail's file, made when it is not there yet. Raises UserError for a picture that cannot be read."""
        path = self._place(picture, edit)
        if not path.exists() or not path.stat().st_size:  # a power cut may leave an empty one
            small = small_picture(picture, edit, THUMBNAIL_SIDE)
            with atomic_path(path, durable=False) as temporary:
                small.save(temporary, format="JPEG", quality=85)
        return path

    def forget(self, picture: Path, edit: PictureEdit = UNTOUCHED) -> None:
        """Delete the thumbnails of a picture: as it is, and with its edit."""
        for version in (UNTOUCHED, edit):
            self._place(picture, version).unlink(missing_ok=True)

    def _place(self, picture: Path, edit: PictureEdit) -> Path:
        facts = picture.stat()
        name = f"{picture}\0{facts.st_mtime_ns}\0{facts.st_size}\0{edit.rotate}\0{edit.crop}"
        key = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
        return self.folder / key[:2] / f"{key}.jpg"
