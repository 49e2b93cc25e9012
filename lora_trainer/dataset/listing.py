"""What lies in a data folder: pictures, their masks, other files; and what kohya's folder names say."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.images import IMAGE_EXTENSIONS
from lora_trainer.dataset.keys import fold, folder_of
from lora_trainer.dataset.links import Link, Links, is_within, not_followed
from lora_trainer.dataset.masks import Stems, find_companions, is_picture
from lora_trainer.dataset.samples import Skipped
from lora_trainer.errors import UserError, has_half_characters
from lora_trainer.files import is_of_the_system

_UNREADABLE_EXTENSIONS = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".raw", ".cr2", ".nef", ".arw", ".dng")
_IGNORED_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information")
_KOHYA_FOLDER = re.compile(r"([0-9]+)_(.+)")
_MAX_REPEATS = 10_000
_MAX_ENTRIES = 1_000_000
_MAX_SECONDS = 60
_SHOWN = 5
_SURPRISING_REPEATS = 200


class Files(Mapping[str, Path]):
    """Files of a folder, by key. Paths are made when they are asked for: of many pictures they take a kilobyte each."""

    def __init__(self, root: Path, keys: Iterable[str]):
        self._root, self._keys = root, dict.fromkeys(keys)
        self._start = os.path.join(root, "")

    def name(self, key: str) -> str:
        """The path of a file as text."""
        return self._start + key

    def __getitem__(self, key: str) -> Path:
        if key not in self._keys:
            raise KeyError(key)
        return self._root / key

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class Listing:
    """What lies in a data folder. Keys are posix paths relative to ``root``, in sorted order.

    files: every visible regular file. pictures: those of them that are samples (no masks). masks: by the key of the
    picture that they belong to.
    """

    root: Path
    files: Files
    pictures: Files
    masks: Mapping[str, Path]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    def without(self, pictures: Collection[str]) -> Listing:
        """The same without these pictures."""
        return replace(self, pictures=Files(self.root, (key for key in self.pictures if key not in pictures)))


def list_folder(root: Path, exclude: Iterable[Path] = (), *, links: Links = "pictures") -> Listing:
    """Everything in ``root`` and its sub-folders, without hidden files, caches and the folders in ``exclude``.

    Links to folders outside are followed once each, so loops end.

    links: which links out of ``root`` are followed. Folders of the system are never looked into.

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
    keys: list[str] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    linked: dict[str, Link] = {}
    away: list[str] = []  # links that are not followed
    pending, looked_at, end = [("", real_root)], 0, time.monotonic() + _MAX_SECONDS
    while pending:
        inside, home = pending.pop()  # the start of the keys of a folder's files; see ``Link``
        folder = root / inside
        try:
            with os.scandir(folder) as found:
                entries = list(itertools.islice(found, _MAX_ENTRIES + 1))
        except OSError as error:
            if not inside:
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
            name, key = entry.name, inside + entry.name
            if name.startswith(".") or name.casefold() in _IGNORED_FOLDERS:
                continue
            if _is(entry.is_dir):
                real = os.path.realpath(entry.path)
                if real in excluded:
                    continue
                here = home
                if entry.is_symlink():
                    if not is_within(real_root, real) and (links == "none" or is_of_the_system(Path(real))):
                        away.append(key)
                        continue
                    if is_within(real, real_root) or any(is_within(known, real) for known in (real_root, *followed)):
                        notes.append(f"{name} links to {real}, which is read already; the link is left out.")
                        continue
                    followed.add(real)
                    here = real
                pending.append((f"{key}/", here))
            elif has_half_characters(name):
                skipped.append(Skipped(root / key, "its name is not UTF-8; rename it"))
            elif _is(entry.is_file):  # no pipes or devices, which would block
                keys.append(key)
                if entry.is_symlink():
                    linked[key] = Link(os.path.realpath(entry.path), home)
            elif entry.is_symlink() and is_picture(name):
                skipped.append(Skipped(root / key, "it is a link to a file that is not there"))
    known = find_companions(keys)
    others = {*known.masks.values(), *known.conditions, *known.strays}
    left_out = not_followed(linked, real_root, {key for key in linked if is_picture(key) and key not in others}, links)
    away += left_out
    if away:
        notes.append(f"{len(away)} links lead out of the folder and are not followed: {_first(away)}.")
    files = Files(root, sorted(key for key in keys if key not in left_out))
    pictures = Files(root, (key for key in files if is_picture(key) and key not in others))
    if known.conditions:
        notes.append(f"{len(known.conditions)} conditioning pictures are left out: {_first(known.conditions)}.")
    if known.strays:
        notes.append(f"{len(known.strays)} masks belong to no picture and are left out: {_first(known.strays)}.")
    for key in files:
        if key.casefold().endswith(_UNREADABLE_EXTENSIONS):
            suffix = PurePosixPath(key).suffix
            skipped.append(Skipped(files[key], f"{suffix} pictures cannot be read; convert it to PNG or JPEG"))
    masks = {key: files[mask] for key, mask in known.masks.items() if mask in files}
    return Listing(root, files, pictures, masks, tuple(skipped), tuple(notes))


def _first(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)[:_SHOWN])


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; not where the system cannot tell."""
    try:
        return kind()
    except OSError:
        return False


class KohyaFolders:
    """What the names of a data folder and of its folders say, as kohya's scripts read them."""

    def __init__(self, root: Path):
        self._name = root.resolve().name
        self._known: dict[str, tuple[int, str] | None] = {}

    def above(self, key: str) -> tuple[int, str] | None:
        """(repeats, class tokens) of the nearest folder named ``<repeats>_<class>`` above a picture."""
        folder = folder_of(key)
        if folder not in self._known:
            self._known[folder] = self._look(folder)
        return self._known[folder]

    def _look(self, folder: str) -> tuple[int, str] | None:
        for name in (*reversed(folder.split("/")), self._name):
            match = _KOHYA_FOLDER.fullmatch(name)
            if match and len(match[1]) <= len(str(_MAX_REPEATS)) and int(match[1]) <= _MAX_REPEATS:
                return int(match[1]), match[2].strip()
        return None


def mask_of(listing: Listing, key: str) -> Path | None:
    """The mask of a picture: a file beside it, or one of its name in a folder ``masks``."""
    return listing.masks.get(key)


def masks_in(folder: Path, listing: Listing) -> dict[str, Path]:
    """Picture's key -> the file of its name in a folder of masks that lies anywhere. Raises UserError for no folder."""
    files = list_folder(folder).files
    stems = Stems(key for key in files if key.casefold().endswith(IMAGE_EXTENSIONS))
    return {key: files[mask] for key in listing.pictures if (mask := stems.mask_of(key)) is not None}


def folder_notes(listing: Listing) -> list[str]:
    notes = []
    folders = {folder_of(key) for key in listing.pictures}
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
        self._listing = listing
        self._folded: dict[str, str] = {}
        for key in listing.files:
            self._folded.setdefault(fold(key), key)

    def find(self, name: str) -> str | None:
        return self.find_key(name) or self.find_key(str(PurePosixPath(name.replace("\\", "/"))))

    def find_key(self, key: str) -> str | None:
        """The same for a name that is written as keys are."""
        return key if key in self._listing.files else self._folded.get(fold(key))

    @cached_property
    def _pictures(self) -> Mapping[str, str | None]:
        found: dict[str, str | None] = {}
        for key in self._listing.pictures:
            for name in {PurePosixPath(key).name, PurePosixPath(key).stem}:
                found[fold(name)] = None if fold(name) in found else key
        return found

    def find_below(self, name: str) -> str | None:
        """The one picture in some sub-folder with this bare name, with or without its ending; None for none or
        several."""
        return None if "/" in name or "\\" in name else self._pictures.get(fold(name))
