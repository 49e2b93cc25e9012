"""Which files of a folder are masks of pictures or conditioning pictures, by the names that tools give them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from lora_trainer.dataset.images import IMAGE_EXTENSIONS
from lora_trainer.dataset.keys import CAPTION_ENDINGS, fold, folder_of, name_of, stem_of

_MASK_ENDINGS = (".mask", "-masklabel")
"""What goes behind a picture's name, with or without its own ending, to make its mask's: ours, and OneTrainer's."""
_LIKELY_MASK_ENDINGS = ("-mask", "_mask", "_masklabel")
"""The same where a picture of that name is beside it."""
_ENDINGS = (*_MASK_ENDINGS, *_LIKELY_MASK_ENDINGS)
_MASK_FOLDERS = ("mask", "masks")
"""Folders near pictures, whose files have the pictures' names."""
_CONDITION_ENDING = "-condlabel"  # OneTrainer's conditioning pictures, which nothing is taught by here
_CONDITION_FOLDERS = (
    "cond", "conditioning", "conditioning_data", "conditioning_image", "conditioning_images", "control",
    "control_images",
)  # fmt: skip


@dataclass
class Companions:
    """Files that belong to pictures. masks: picture's key -> its mask's. conditions: conditioning pictures. strays:
    masks, by their names or beside other masks, of which no picture is there."""

    masks: dict[str, str] = field(default_factory=dict)
    conditions: set[str] = field(default_factory=set)
    strays: set[str] = field(default_factory=set)


def is_picture(name: str) -> bool:
    """Whether a file of this name is a training picture, as far as the name alone tells (masks are not)."""
    name = name.lower()
    return name.endswith(IMAGE_EXTENSIONS) and not stem_of(name).endswith((*_MASK_ENDINGS, _CONDITION_ENDING))


def find_companions(files: Iterable[str]) -> Companions:
    """Masks and conditioning pictures among the keys of a folder's files; names are compared in any case.

    A picture with a caption file of its own is trained, though its folder is called as one of conditioning pictures or
    is one of masks for other pictures.
    """
    files = list(files)
    images = [key for key in files if key.lower().endswith(IMAGE_EXTENSIONS)]
    found = Companions(conditions={key for key in images if stem_of(key).lower().endswith(_CONDITION_ENDING)})
    folders = {folder_of(key) for key in images}
    mask_folders = {fold(folder) for folder in folders if _lies_in(folder, _MASK_FOLDERS)}
    condition_folders = {fold(folder) for folder in folders if _lies_in(folder, _CONDITION_FOLDERS)}
    if not mask_folders | condition_folders and not any(stem_of(key).lower().endswith(_ENDINGS) for key in images):
        return found
    stems = Stems(images)
    captioned = {fold(stem_of(key)) for key in files if key.lower().endswith(CAPTION_ENDINGS)}
    for key in filter(is_picture, images):
        beside = [one + ending for ending in _ENDINGS for one in (stem_of(key), key)]
        inside = [
            f"{folder}/{name}" for folder in _mirrors(key, _MASK_FOLDERS, mask_folders) for name in _mask_names(key)
        ]
        if mask := stems.first([*beside, *inside], key):
            found.masks[key] = mask
        name = stem_of(name_of(key))
        conditions = (f"{folder}/{name}" for folder in _mirrors(key, _CONDITION_FOLDERS, condition_folders))
        if (condition := stems.first(conditions, key)) and fold(stem_of(condition)) not in captioned:
            found.conditions.add(condition)
    others = found.conditions.union(found.masks.values())
    found.masks = {key: mask for key, mask in found.masks.items() if key not in others}
    of_masks = {folder_of(mask) for mask in found.masks.values() if fold(folder_of(mask)) in mask_folders}
    for key in images:
        beside_masks = folder_of(key) in of_masks and fold(stem_of(key)) not in captioned
        if key not in others and (beside_masks or not is_picture(key)):
            found.strays.add(key)
    return found


class Stems:
    """Pictures by their keys without the endings: as written, else in any case."""

    def __init__(self, keys: Iterable[str]):
        self._exact = {stem_of(key): key for key in keys}
        self._folded: dict[str, str] = {}
        for stem, key in self._exact.items():
            self._folded.setdefault(fold(stem), key)

    def first(self, stems: Iterable[str], but: str = "") -> str | None:
        """The key of the first of these stems that is there and is not ``but``."""
        for stem in stems:
            key = self._exact.get(stem) or self._folded.get(fold(stem))
            if key is not None and key != but:
                return key
        return None

    def mask_of(self, key: str) -> str | None:
        """The mask of a picture of another folder: of its key, else of its name."""
        start = f"{folder_of(key)}/".lstrip("/")
        names = _mask_names(key)
        return self.first([*(start + name for name in names), *names])


def _lies_in(folder: str, names: tuple[str, ...]) -> bool:
    return any(part in names for part in folder.lower().split("/"))


def _mask_names(key: str) -> list[str]:
    """The names, without their own ending, that a picture's mask may have in a folder of masks."""
    name = name_of(key)
    return [stem_of(name), *(one + ending for ending in _ENDINGS for one in (stem_of(name), name))]


def _mirrors(key: str, names: tuple[str, ...], there: Collection[str]) -> Iterator[str]:
    """Folders of these names that mirror a picture's, the nearest first: for ``a/b/c.png`` ``a/b/masks``,
    ``a/masks/b``, ``a/masks``, ``masks/a/b`` and ``masks/b``, as far as they are among ``there`` (folded)."""
    if not there:
        return
    parts = folder_of(key).split("/") if "/" in key else []
    for depth in range(len(parts), -1, -1):
        for below in dict.fromkeys((depth, min(depth + 1, len(parts)))):
            for name in names:
                folder = "/".join([*parts[:depth], name, *parts[below:]])
                if fold(folder) in there:
                    yield folder
