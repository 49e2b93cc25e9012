"""What the editor does to pictures without touching them: exclude, turn, crop. Kept in ``.lora_trainer.json``.

The file lies in the data folder and is small, sorted JSON, so that git and people can read it:
``{"version": 1, "pictures": {"sub/a.png": {"crop": [0.1, 0, 0.9, 1], "excluded": true, "rotate": 90}}}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write

EDITS_NAME = ".lora_trainer.json"

_VERSION = 1
_TURNS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
_MIN_SHARE = 0.01  # of a side; a crop below it is a slip


@dataclass(frozen=True)
class PictureEdit:
    """excluded: left out of training. rotate: degrees clockwise, 0, 90, 180 or 270. crop: (left, top, right, bottom)
    as shares 0…1 of the turned picture's width and height, so that it holds for masks and thumbnails as well."""

    excluded: bool = False
    rotate: int = 0
    crop: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a turn or a crop that cannot be."""
        if self.rotate not in (0, *_TURNS):
            raise UserError(f"{self.rotate} is no turn.", field="rotate", remedy="Use 0, 90, 180 or 270 degrees.")
        if self.crop is not None:
            left, top, right, bottom = self.crop
            inside = all(0 <= share <= 1 for share in self.crop)
            if not inside or min(right - left, bottom - top) < _MIN_SHARE:
                raise UserError(
                    f"{list(self.crop)} is no crop.", field="crop",
                    remedy="Give left, top, right and bottom as shares of the picture, such as [0.1, 0, 0.9, 1].",
                )  # fmt: skip

    @property
    def changes_pixels(self) -> bool:
        return self.rotate != 0 or self.crop is not None

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of a picture whose size (width, height) after turning is given."""
        left, top, right, bottom = self.crop or (0.0, 0.0, 1.0, 1.0)
        width, height = size
        x, y = min(round(left * width), width - 1), min(round(top * height), height - 1)
        return x, y, max(x + 1, round(right * width)), max(y + 1, round(bottom * height))

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a picture after the edit; ``size`` is it before, after EXIF rotation."""
        turned = (size[1], size[0]) if self.rotate in (90, 270) else size
        left, top, right, bottom = self.box(turned)
        return right - left, bottom - top

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture (upright as its EXIF data say) turned and cropped."""
        if self.rotate:
            image = image.transpose(_TURNS[self.rotate])
        return image.crop(self.box(image.size)) if self.crop is not None else image

    def digest(self, digest: str) -> str:
        """A picture's digest, another one when the edit changes its pixels: caches must not mistake them."""
        if not self.changes_pixels:
            return digest
        return hashlib.sha256(f"{digest}:{self.rotate}:{self.crop}".encode()).hexdigest()


UNTOUCHED = PictureEdit()


def load_edits(root: Path) -> dict[str, PictureEdit]:
    """Key (posix path relative to ``root``) -> edit, of the pictures that have one.

    Raises:
        UserError: the file is damaged or was written by a newer version. Nothing is guessed: excluded pictures would
            be trained on.
    """
    path = Path(root) / EDITS_NAME
    content = _read(path)
    pictures = content.get("pictures", {})
    damaged = UserError(f"{path.name} is damaged.", remedy="Put back an older copy of it, or remove it.")
    if not isinstance(pictures, dict):
        raise damaged
    edits = {}
    for key, values in pictures.items():
        try:
            crop = values.get("crop")
            crop = None if crop is None else tuple(float(value) for value in crop)
            edit = PictureEdit(bool(values.get("excluded", False)), int(values.get("rotate", 0)), crop)
        except (UserError, AttributeError, TypeError, ValueError) as error:
            raise damaged from error
        if edit != UNTOUCHED:
            edits[str(key)] = edit
    return edits


def save_edits(root: Path, edits: Mapping[str, PictureEdit]) -> None:
    """Write the edits of these pictures; those of others stay. Raises UserError as ``load_edits``, or a full disk."""
    path = Path(root) / EDITS_NAME
    merged = {**load_edits(root), **edits}
    pictures = {key: _values(edit) for key, edit in sorted(merged.items()) if edit != UNTOUCHED}
    content = {**_read(path), "version": _VERSION, "pictures": pictures}
    if pictures or path.exists():
        atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def _values(edit: PictureEdit) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if edit.crop is not None:
        values["crop"] = [round(value, 6) for value in edit.crop]
    if edit.excluded:
        values["excluded"] = True
    if edit.rotate:
        values["rotate"] = edit.rotate
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be read ({error}).", remedy="Put back an older copy of it, or remove it."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("version", _VERSION), int):
        raise UserError(f"{path.name} is damaged.", remedy="Put back an older copy of it, or remove it.")
    if content.get("version", _VERSION) > _VERSION:
        raise UserError(f"{path.name} was written by a newer version of the trainer.", remedy="Update the trainer.")
    return content
