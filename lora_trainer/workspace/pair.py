"""A pair of pictures, before and after a change, that is put together picture by picture as a dataset of its own."""

from __future__ import annotations

import itertools
import os
from datetime import datetime

from lora_trainer.errors import UserError
from lora_trainer.workspace.library import DatasetLibrary, Picture

STEMS = {"before": "pair", "after": "pair_after"}
"""Names of the files, without their endings; the setting pair_suffix finds them."""


def pair_in(library: DatasetLibrary, name: str | None) -> dict[str, Picture]:
    """The pictures of a pair by place, before and after; empty where the dataset is not there or holds others."""
    try:
        pictures = library.pictures(name) if name else []
    except UserError:
        return {}
    found = {place: one for place, stem in STEMS.items() for one in pictures if os.path.splitext(one.file)[0] == stem}
    return found if len(found) == len(pictures) else {}


def put(library: DatasetLibrary, name: str | None, place: str, file: str, data: bytes, caption: str = "") -> str:
    """Put a picture into a pair. Where the place is taken, or ``name`` is no pair, a new dataset is made with the other
    picture of the old one, which stays as it is. Returns the name of the dataset.

    caption: of this picture; a picture without one has that of the other.

    Raises:
        UserError: naming the file: it is not a picture, or too large.
    """
    if place not in STEMS:
        raise UserError(f"A pair has no place {place!r}.", field="place", remedy=f"One of {', '.join(STEMS)}.")
    there = pair_in(library, name)
    if there and place not in there:
        target = name or ""
        _add(library, target, place, file, data, caption)
    else:
        target = _new(library)
        try:
            _add(library, target, place, file, data, caption)
            for other, picture in there.items():
                if other != place:
                    path = library.picture(name or "", picture.file)
                    library.add_picture(target, path.name, path.read_bytes(), picture.caption)
        except UserError:
            library.set_aside(target)
            library.purge()
            raise
    now = pair_in(library, target)
    spoken = next((text for where in STEMS if where in now and (text := now[where].caption.strip())), "")
    library.add_captions(target, {picture.file: spoken for picture in now.values()})
    return target


def _add(library: DatasetLibrary, name: str, place: str, file: str, data: bytes, caption: str) -> None:
    stored = STEMS[place] + os.path.splitext(file)[1]
    try:
        library.add_picture(name, stored, data, caption)
    except UserError as error:
        raise UserError(error.message.replace(stored, file), field="train_data_dir", remedy=error.remedy) from error


def _new(library: DatasetLibrary) -> str:
    usual = datetime.now().strftime("pair %Y-%m-%d %H.%M.%S")
    taken = {one.name for one in library.datasets()}
    names = itertools.chain([usual], (f"{usual} {number}" for number in itertools.count(2)))
    return library.create(next(name for name in names if name not in taken)).name
