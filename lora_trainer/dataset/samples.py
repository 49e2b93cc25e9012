"""A training set: its pictures, and the views of them that an epoch consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit

Size = tuple[int, int]  # (width, height) in pixels
Place = tuple[int, int, int, int]  # (left, top, width, height) in pixels


@dataclass(frozen=True)
class Skipped:
    """A picture that is not trained on, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture of the training set.

    file: the path of the picture, as text, as a data set may have many.
    key: posix path relative to the data folder (``reg:`` before it for regularization pictures); names the sample.
    caption: as written, with its marks, translated by ``caption_mapping``; the class tokens or the trigger word where
        there was none.
    size: (width, height) in pixels, after EXIF rotation and ``edit``.
    digest: SHA-256 of the file's bytes, and of ``edit`` where there is one; hexadecimal.
    edit: how the picture is turned and cropped when it is read.
    caption_from: the name of the file, or of the setting, that gave the caption; "folder" for the class in its name.
    """

    file: str
    key: str
    caption: str
    size: tuple[int, int]
    digest: str
    repeats: int = 1
    is_regularization: bool = False
    mask_path: Path | None = None
    edit: PictureEdit = UNTOUCHED
    caption_from: str = ""

    @property
    def path(self) -> Path:
        return Path(self.file)


@dataclass(frozen=True)
class Dataset:
    """Training samples first, then the regularization samples; both in the order of their keys."""

    root: Path
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()


def uncut(size: Size) -> tuple[int, ...]:
    """The ``View.time_ids`` of a picture of this (width, height) that is neither scaled nor cropped."""
    width, height = size
    return height, width, 0, 0, height, width


@dataclass(frozen=True, slots=True)
class View:
    """One picture as it is shown once in an epoch.

    sample: index into ``dataset.samples``.
    bucket: (width, height) of the picture that is trained; scaled: (width, height) before cropping to it.
    crop: (left, top) of the crop in the scaled picture; flip: mirrored after cropping.
    augmentation: seed of the augmentations; None without.
    time_ids: original (h, w), crop (top, left), target (h, w), in pixels: what some models are told of it.
    place: where it is shown smaller in its bucket, after mirroring; None fills the bucket.
    """

    sample: int
    bucket: Size
    scaled: Size
    crop: tuple[int, int]
    flip: bool
    time_ids: tuple[int, ...]
    augmentation: str | None = None
    place: Place | None = None
