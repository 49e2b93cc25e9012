"""What lies in a data folder: pictures, their masks, other files; and what kohya's folder names say."""

from __future__ import annotations

import itertools
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from lora_trainer.dataset.images import IMAGE_EXTENSIONS
from lora_trainer.dataset.samples import Skipped
from lora_trainer.errors import UserError, has_half_characters
from lora_trainer.files import is_of_the_system

_MASK_ENDINGS = (".mask", "-masklabel")
"""What goes behind a picture's name, with or without its own ending, to make its mask's: ours, and OneTrainer's."""
_LIKELY_MASK_ENDINGS = ("-mask", "_mask")
"""The same where a picture of that name is beside it."""
_MASK_FOLDERS = ("mask", "masks")
"""Folders beside pictures, whose files have the pictures' names."""
_CONDITION_ENDING = "-condlabel"  # OneTrainer's conditioning pictures, which nothing is taught by here

_UNREADABLE_EXTENSIONS = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".raw", ".cr2", ".nef", ".arw", ".dng")
_IGNORED_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information")
_KOHYA_FOLDER = re.compile(r"([0-9]+)_(.+)")
_MAX_REPEATS = 10_000
_MAX_ENTRIES = 200_000
_MAX_SECONDS = 60
_SURPRISING_REPEATS = 200


Links = Literal["none", "pictures", "all"]


@dataclass(frozen=True)
class Listing:
    """What lies in a data folder. Keys are posix paths relative to ``root``, in sorted order.

    files: every visible regular file. pictures: those of them that are samples (no masks). masks: by the key of the
    picture that they belong to.
    """

    root: Path
    files: Mapping[str, Path]
    pictures: Mapping[str, Path]
    masks: Mapping[str, Path]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()


def list_folder(root: Path, exclude: Iterable[Path] = (), *, links: Links = "pictures") -> Listing:
    """Everything in ``root`` and its sub-folders, without hidden files, caches and the folders in ``exclude``.

    Links to folders outside are followed once each, so loops end.

    links: to files outside of ``root`` that are followed. "pictures": others (captions, tables) only where they lead to
        a folder that is read, or in which a picture of these lies: nobody's other texts become captions. "all", for
        who edits the own files. "none" follows no link out of ``root``, to folders neither.

    Raises:
        UserError: there is no such folder, or it cannot be opened; or it is one of the system, has too many files or
            takes too long to look through.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"There is no folder {root}." if not root.exists() else f"{root.name} is a file, not a folder.",
            remedy="Name the folder that holds the pictures.",
        )
    real_root = os.path.realpath(root)
    if os.path.dirname(real_root) == real_root:
        raise UserError("The folder is a whole disk.", remedy="Name the folder that holds the pictures.")
    if is_of_the_system(Path(real_root)):
        raise UserError(f"The folder {root} belongs to the system.", remedy="Name the folder that holds the pictures.")
    excluded = {os.path.realpath(path) for path in exclude} - {real_root}
    followed: set[str] = set()
    files: dict[str, Path] = {}
    skipped: list[Skipped] = []
    notes: list[str] = []
    linked: dict[str, str] = {}  # key of a file -> where its link leads
    away: list[str] = []  # links that are not followed
    pending, looked_at, end = [root], 0, time.monotonic() + _MAX_SECONDS
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(itertools.islice(found, _MAX_ENTRIES + 1))
        except OSError as error:
            if folder == root:
                raise UserError(f"{root.name} cannot be opened: {error.strerror or error}.") from error
            notes.append(f"{folder.name} cannot be opened ({error.strerror or error}); it is left out.")
            continue
        looked_at += len(entries)
        if looked_at > _MAX_ENTRIES:
            raise UserError(
                f"{root.name} holds more than {_MAX_ENTRIES} files and folders.",
                remedy="Name the folder that holds the pictures, and nothing else.",
            )
        if time.monotonic() > end:
            raise UserError(
                f"Looking through {root} takes longer than {_MAX_SECONDS} seconds.",
                remedy="Name the folder that holds the pictures, and nothing else.",
            )
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name.casefold() in _IGNORED_FOLDERS:
                continue
            if path.is_dir():
                real = os.path.realpath(path)
                if real in excluded:
                    continue
                if entry.is_symlink():
                    if links == "none" and not _is_within(real_root, real):
                        away.append(path.relative_to(root).as_posix())
                        continue
                    if _is_within(real, real_root) or any(_is_within(known, real) for known in (real_root, *followed)):
                        notes.append(f"{path.name} links to {real}, which is read already; the link is left out.")
                        continue
                    followed.add(real)
                pending.append(path)
            elif has_half_characters(entry.name):
                skipped.append(Skipped(path, "its name is not UTF-8; rename it"))
            elif path.is_file():  # no pipes or devices, which would block
                key = path.relative_to(root).as_posix()
                files[key] = path
                if entry.is_symlink():
                    linked[key] = os.path.realpath(path)
            elif entry.is_symlink() and is_picture(entry.name):
                skipped.append(Skipped(path, "it is a link to a file that is not there"))
    read = (real_root, *followed)
    outside = {key: real for key, real in linked.items() if not any(_is_within(place, real) for place in read)}
    for key in _not_followed(outside, links):
        away.append(key)
        del files[key]
    if away:
        notes.append(f"{len(away)} links lead out of the folder and are not followed: {', '.join(sorted(away)[:5])}.")
    files = dict(sorted(files.items()))
    pictures = {key: path for key, path in files.items() if is_picture(key)}
    masks = _masks(files, pictures)
    of_pictures = set(masks.values())
    pictures = {key: path for key, path in pictures.items() if path not in of_pictures}
    if conditions := sum(_stem(key).casefold().endswith(_CONDITION_ENDING) for key in files):
        notes.append(f"{conditions} conditioning pictures (…{_CONDITION_ENDING}.png) are left out.")
    for path in files.values():
        if path.suffix.casefold() in _UNREADABLE_EXTENSIONS:
            skipped.append(Skipped(path, f"{path.suffix} pictures cannot be read; convert it to PNG or JPEG"))
    return Listing(root, files, pictures, masks, tuple(skipped), tuple(notes))


def _not_followed(outside: Mapping[str, str], links: Links) -> list[str]:
    """Of the links that lead out of a data folder (key -> where to) those that are left out."""
    pictures = {key for key in outside if key.casefold().endswith(IMAGE_EXTENSIONS)}
    others = [key for key in outside if key not in pictures]
    if links == "none":
        return list(outside)
    if links == "all" or not others:
        return []
    folders = {os.path.dirname(outside[key]) for key in others}
    # A data set may be made of links altogether, as in the cache of Hugging Face's hub.
    shared = {os.path.dirname(outside[key]) for key in pictures if _is_image(outside[key], folders)}
    return [key for key in others if os.path.dirname(outside[key]) not in shared]


def _is_image(path: str, folders: set[str]) -> bool:
    """Whether the file lies in one of these folders and is a picture, whatever its name says."""
    if os.path.dirname(path) not in folders:
        return False
    try:
        with Image.open(path):
            return True
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def is_picture(name: str) -> bool:
    """Whether a file of this name is a training picture, as far as the name alone tells (masks are not)."""
    name = name.casefold()
    return name.endswith(IMAGE_EXTENSIONS) and not _stem(name).endswith((*_MASK_ENDINGS, _CONDITION_ENDING))


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _masks(files: Mapping[str, Path], pictures: Mapping[str, Path]) -> dict[str, Path]:
    """Picture's key -> its mask: a file beside it with an ending of masks, or of its name in a folder of masks."""
    by_stem = {_stem(key): path for key, path in files.items() if key.casefold().endswith(IMAGE_EXTENSIONS)}
    folders = {str(PurePosixPath(key).parent) for key in files}
    found: dict[str, Path] = {}
    for key in pictures:
        place, name = PurePosixPath(key).parent, PurePosixPath(key).name
        beside = [stem + ending for ending in (*_MASK_ENDINGS, *_LIKELY_MASK_ENDINGS) for stem in (_stem(key), key)]
        near = [place / folder for folder in _MASK_FOLDERS] + [place.parent / folder for folder in _MASK_FOLDERS]
        endings = ("", *_MASK_ENDINGS, *_LIKELY_MASK_ENDINGS)
        near = [folder for folder in near if str(folder) in folders and folder != place]
        inside = [str(folder / (_stem(name) + ending)) for folder in near for ending in endings]
        for candidate in (*beside, *inside):
            if candidate in by_stem and by_stem[candidate] != pictures[key]:
                found[key] = by_stem[candidate]
                break
    of_pictures = set(found.values())
    return {key: mask for key, mask in found.items() if pictures[key] not in of_pictures}


def kohya_folder(root: Path, key: str) -> tuple[int, str] | None:
    """(repeats, class tokens) of the nearest folder named ``<repeats>_<class>`` above a picture, ``root`` included."""
    for name in (*reversed(PurePosixPath(key).parts[:-1]), root.resolve().name):
        match = _KOHYA_FOLDER.fullmatch(name)
        if match and len(match[1]) <= len(str(_MAX_REPEATS)) and int(match[1]) <= _MAX_REPEATS:
            return int(match[1]), match[2].strip()
    return None


def mask_of(listing: Listing, key: str) -> Path | None:
    """The mask of a picture: a file beside it, or one of its name in a folder ``masks``."""
    return listing.masks.get(key)


def masks_in(folder: Path, listing: Listing) -> dict[str, Path]:
    """Picture's key -> the file of its name in a folder of masks that lies anywhere. Raises UserError for no folder."""
    by_stem = {_stem(key): path for key, path in list_folder(folder).files.items() if path.suffix.casefold()
               in IMAGE_EXTENSIONS}  # fmt: skip
    names = {key: (_stem(key), _stem(PurePosixPath(key).name)) for key in listing.pictures}
    return {key: by_stem[name] for key, both in names.items() for name in reversed(both) if name in by_stem}


def folder_notes(listing: Listing) -> list[str]:
    notes = []
    folders = sorted({str(PurePosixPath(key).parent) for key in listing.pictures})
    names = sorted({part for folder in folders for part in PurePosixPath(folder).parts} | {listing.root.resolve().name})
    for name in names:
        match = _KOHYA_FOLDER.fullmatch(name)
        if match and (len(match[1]) > len(str(_MAX_REPEATS)) or int(match[1]) > _MAX_REPEATS):
            notes.append(f"The folder {name} is read as a plain folder: {match[1]} cannot be a number of repeats.")
        elif match and int(match[1]) > _SURPRISING_REPEATS:
            repeats = int(match[1])
            notes.append(f"The folder {name} means {repeats} repeats of each picture; rename it if that is not meant.")
    return notes


class NameIndex:
    """Finds files of a listing by a name that a person typed: in any case, any Unicode form, with either slash."""

    def __init__(self, listing: Listing):
        self._files = listing.files
        self._folded: dict[str, str] = {}
        for key in listing.files:
            self._folded.setdefault(_fold(key), key)
        self._pictures: dict[str, str | None] = {}
        for key in listing.pictures:
            for name in {PurePosixPath(key).name, PurePosixPath(key).stem}:
                self._pictures[_fold(name)] = None if _fold(name) in self._pictures else key

    def find(self, name: str) -> str | None:
        if name in self._files:
            return name
        return self._folded.get(_fold(str(PurePosixPath(name.replace("\\", "/")))))

    def find_below(self, name: str) -> str | None:
        """The one picture in some sub-folder with this bare name, with or without its ending; None for none or
        several."""
        return None if "/" in name or "\\" in name else self._pictures.get(_fold(name))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_within(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
