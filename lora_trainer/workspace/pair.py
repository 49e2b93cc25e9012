"""A pair of pictures, before and after a change, that is put together picture by picture as a dataset of its own."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from lora_trainer.errors import UserError
from lora_trainer.workspace.library import MARK, DatasetLibrary, NameTakenError, Picture

STEMS = {"before": "pair", "after": "pair_after"}
"""Names of the files, without their endings; the setting pair_suffix finds them."""

_NAME = "pair %Y-%m-%d %H.%M.%S"
_NAMED = re.compile(r"pair \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d( \d+)?")


def pair_in(library: DatasetLibrary, name: str | None) -> dict[str, Picture]:
    """The pictures of a pair by place, before and after; empty where the dataset is not there or holds others."""
    try:
        pictures = library.pictures(name) if name else []
    except UserError:
        return {}
    found = {place: one for place, stem in STEMS.items() for one in pictures if os.path.splitext(one.file)[0] == stem}
    return found if len(found) == len(pictures) else {}


def is_as_made(library: DatasetLibrary, name: str) -> bool:
    """Whether a pair has the name that was made for it, and nothing is in it but its pictures and their captions."""
    if not _NAMED.fullmatch(name):
        return False
    files = [one.file for one in pair_in(library, name).values()]
    made = {MARK, *files, *(os.path.splitext(file)[0] + ".txt" for file in files)}
    return bool(files) and {entry.name for entry in library.folder(name).iterdir()} <= made


def put(
    library: DatasetLibrary, name: str | None, place: str, file: str, data: bytes, caption: str = "", keep: bool = False
) -> str:
    """Put a picture into a pair. Where the place is taken, or ``name`` is no pair, a new dataset is made with the other
    picture of the old one, which stays as it is. Returns the name of the dataset.

    caption: of this picture; a picture without one has that of the other. keep: the old dataset stays as it is anyway.

    Raises:
        UserError: naming the file: it is not a picture, or too large.
    """
    if place not in STEMS:
        raise UserError(f"A pair has no place {place!r}.", field="place", remedy=f"One of {', '.join(STEMS)}.")
    there = pair_in(library, name)
    target = None
    if name and there and place not in there and not keep:
        try:
            target = _add(library, name, place, file, data, caption)
        except NameTakenError:  # by a caption without its picture, or by another caller's picture meanwhile
            there = pair_in(library, name)
    if target is None:
        others = {where: picture for where, picture in there.items() if where != place}
        with _copy(library, name, others) as target:
            _add(library, target, place, file, data, caption)
    now = pair_in(library, target)
    spoken = next((text for where in STEMS if where in now and (text := now[where].caption.strip())), "")
    library.add_captions(target, {picture.file: spoken for picture in now.values()})
    return target


def describe(library: DatasetLibrary, name: str, text: str, keep: bool = False) -> str:
    """Say what the pictures of a pair show. keep: the dataset stays as it is, and a new one is made where it says
    something else. Returns the name of the dataset.

    Raises:
        UserError: it is no pair, or the text is too long.
    """
    there = pair_in(library, name)
    if not there:
        raise UserError(f"{name} holds no pair.", field="train_data_dir", remedy="Add the two pictures again.")
    if all(picture.caption == text for picture in there.values()):
        return name
    if keep:
        with _copy(library, name, {place: replace(one, caption=text) for place, one in there.items()}) as target:
            return target
    library.write_captions(name, {picture.file: text for picture in there.values()})
    return name


@contextmanager
def _copy(library: DatasetLibrary, name: str | None, pictures: Mapping[str, Picture]) -> Iterator[str]:
    """A new dataset with these pictures of a pair, what the editor does to them, and the pair's masks, as both pictures
    show the same scene. It is deleted where what is done with it fails."""
    target = _new(library)
    try:
        for picture in pictures.values():
            path = library.picture(name or "", picture.file)
            library.add_picture(target, path.name, path.read_bytes(), picture.caption)
        if name and pictures:
            library.copy_masks_and_edits(name, target, [picture.file for picture in pictures.values()])
        yield target
    except (UserError, OSError):
        library.set_aside(target)
        library.purge()
        raise


def _add(library: DatasetLibrary, name: str, place: str, file: str, data: bytes, caption: str) -> str:
    stored = STEMS[place] + os.path.splitext(file)[1]
    try:
        library.add_picture(name, stored, data, caption, numbered=False)
    except NameTakenError:
        raise
    except UserError as error:
        raise UserError(error.message.replace(stored, file), field="train_data_dir", remedy=error.remedy) from error
    return name


def _new(library: DatasetLibrary) -> str:
    usual = datetime.now().strftime(_NAME)
    taken = {one.name for one in library.datasets()}
    names = itertools.chain([usual], (f"{usual} {number}" for number in itertools.count(2)))
    return library.create(next(name for name in names if name not in taken)).name
