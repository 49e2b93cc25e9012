"""The pictures that were uploaded: one folder per dataset under ``<data>/datasets``, captions as text files."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_trainer.dataset.text.rows import ENDINGS as ROW_FILES
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path, atomic_write, safe_name_problem
from lora_trainer.workspace.paths import check_name, confined

if TYPE_CHECKING:
    from lora_trainer.dataset.thumbnails import ThumbnailCache

MAX_PICTURE_BYTES = 64 << 20
MAX_CAPTION_CHARACTERS = 20_000

MARK = ".lora-trainer-dataset"
_UNMARKED = re.compile(r"pictures \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d")
"""Names that the page gave before data sets were marked."""
_DELETED = ".deleted-"

# Two pictures that come at once under one name get two names; of two that are left out at once, both are.
_changing = threading.Lock()


class NameTakenError(UserError):
    """Another file has the name that a picture was to have."""


@dataclass(frozen=True)
class DatasetSummary:
    """name: of its folder. pictures: how many. changed: seconds since 1970. size: bytes of all its files. cover: the
    first picture, as a posix path. own: made here, and not a folder that somebody put beside the others. texts: files
    with rows for a language model, where it has no pictures."""

    name: str
    pictures: int
    changed: float
    size: int
    cover: str | None
    own: bool
    texts: int = 0


@dataclass(frozen=True)
class Picture:
    """file: posix path inside the dataset. caption: as written, empty when there is none. size: bytes. excluded: it
    stays in the dataset but is not trained on."""

    file: str
    caption: str
    size: int
    excluded: bool = False


class DatasetLibrary:
    """Adds pictures and captions, leaves pictures out; overwrites a caption when asked, never a picture. Renames and
    deletes whole data sets, of those that it has made."""

    def __init__(self, data: Path):
        self.root = Path(data) / "datasets"
        self._cache = Path(data) / "cache"
        self._thumbnails = self._cache / "thumbnails"

    def folder(self, name: str) -> Path:
        """The folder of a dataset. Raises UserError for a name that cannot be one, or that does not exist."""
        check_name(name, "dataset")
        path = confined(self.root, name)
        if not path.is_dir():
            raise UserError(f"There is no dataset {name}.", field="dataset", remedy="Reload the list of datasets.")
        return path

    def datasets(self) -> list[DatasetSummary]:
        """Every dataset, the one changed last first."""
        named = [entry for entry in _entries(self.root) if entry.is_dir() and safe_name_problem(entry.name) is None]
        return sorted(map(self._summary, named), key=lambda dataset: -dataset.changed)

    def _summary(self, folder: os.DirEntry[str]) -> DatasetSummary:
        from lora_trainer.dataset.masks import is_picture

        pictures, texts, size, cover = 0, 0, 0, None
        for entry in _files(folder.path):
            size += entry.stat(follow_symlinks=False).st_size
            texts += entry.name.lower().endswith(ROW_FILES)
            if is_picture(entry.name):
                pictures += 1
                file = Path(entry.path).relative_to(folder.path).as_posix()
                cover = min(cover or file, file)
        own = self._is_own(Path(folder.path))
        texts = 0 if pictures else texts  # beside pictures they are tables of captions
        return DatasetSummary(folder.name, pictures, folder.stat().st_mtime, size, cover, own, texts)

    def _is_own(self, folder: Path) -> bool:
        """Whether it was made here: never what a link leads to, nor what somebody has put there."""
        if folder.resolve() != self.root.resolve() / folder.name:
            return False
        return (folder / MARK).is_file() or _UNMARKED.fullmatch(folder.name) is not None

    def create(self, name: str) -> Path:
        """A new, empty dataset. Raises UserError when there is one of this name."""
        path = self.root / check_name(name, "name")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"There is a dataset {name} already.", field="name", remedy="Add to it, or choose another name."
            ) from None
        except OSError as error:
            raise UserError(
                f"The dataset {name} cannot be made: {error.strerror}.", field="name", remedy="Free some space."
            ) from error
        (path / MARK).touch()
        return path

    def add_text(self, file: str, data: bytes) -> str:
        """Keep a file with rows for a language model in a dataset of its own. Returns the name of the dataset.

        Raises:
            UserError: it is no such file, or has no row that can be read.
        """
        from lora_trainer.dataset.text.rows import read_rows

        stem = Path(check_name(file, "train_data_dir")).stem
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        with _changing:
            folder = self.create(next(name for name in names if not (self.root / name).exists()))
        try:
            atomic_write(folder / file, data)
            rows, bad = read_rows(folder / file)
            if not rows:
                why = f": {bad[0].where}: {bad[0].reason}" if bad else ""
                remedy = 'Give lines such as {"prompt": "…", "response": "…"}.'
                raise UserError(f"{file} has no row that can be read{why}.", field="train_data_dir", remedy=remedy)
        except UserError:
            shutil.rmtree(folder)
            raise
        return folder.name

    def own(self, name: str) -> Path:
        """The folder of a dataset that was made here. Raises UserError for another, or where there is none."""
        path = self.folder(name)
        if not self._is_own(self.root / name):
            raise UserError(
                f"The folder {name} was not made by the trainer.", field="dataset",
                remedy="It stays as it is; rename or delete it yourself.",
            )  # fmt: skip
        return path

    def rename(self, name: str, new: str) -> Path:
        """Give a dataset another name; returns its folder. Raises UserError when that is taken or cannot be a name, and
        for a folder that was not made here."""
        from lora_trainer.dataset.cache import rename_user

        path, target = self.own(name), self.root / check_name(new, "name")
        if target.exists() and not (new.casefold() == name.casefold() and target.samefile(path)):
            raise UserError(f"There is a dataset {new} already.", field="name", remedy="Choose another name.")
        (path / MARK).touch()
        _move(path, target, "{0} could not be renamed: {1}.", name)
        rename_user(self._cache, path.resolve(), target.resolve())
        return target

    def set_aside(self, name: str) -> None:
        """Take a dataset out of the list at once, so that nobody sees half of it, and delete its thumbnails and what
        only it has in the cache; ``purge`` deletes the rest. Raises UserError for a folder that was not made here."""
        from lora_trainer.dataset.cache import forget
        from lora_trainer.dataset.listing import list_folder
        from lora_trainer.dataset.picture_edits import UNTOUCHED, load_edits

        path = self.own(name)
        edits = load_edits(path)
        for file, picture in list_folder(path).pictures.items():
            self.thumbnails.forget(picture, edits.get(file, UNTOUCHED))
        _move(path, self.root / f"{_DELETED}{secrets.token_hex(6)}", "{0} could not be deleted: {1}.", name)
        forget(self._cache, path.resolve())

    def purge(self) -> None:
        """Delete what was set aside. Raises UserError where that could not be done completely."""
        for entry in _entries(self.root):
            if entry.name.startswith(_DELETED) and entry.is_dir(follow_symlinks=False):
                try:
                    shutil.rmtree(entry.path)  # does not follow links
                except OSError as error:
                    message = f"{entry.name} could not be deleted completely: {error.strerror}."
                    raise UserError(message, remedy="Close what uses it, and delete it yourself.") from error

    def pictures(self, name: str) -> list[Picture]:
        """Every picture with its caption, in order of its file name."""
        from lora_trainer.dataset.caption_files import read_captions
        from lora_trainer.dataset.listing import list_folder
        from lora_trainer.dataset.picture_edits import UNTOUCHED, load_edits

        root = self.folder(name)
        edits = load_edits(root)
        listing = list_folder(root, links="none")
        captions = read_captions(root, problems=[], listing=listing)
        return [
            Picture(
                key, captions[key].text if key in captions else "", path.stat().st_size,
                edits.get(key, UNTOUCHED).excluded,
            )
            for key, path in listing.pictures.items()
            if path.exists()
        ]  # fmt: skip

    def exclude(self, name: str, files: Sequence[str], excluded: bool = True) -> None:
        """Leave these pictures out of training, or take them in again; their files stay. Raises UserError."""
        from lora_trainer.dataset.picture_edits import UNTOUCHED, load_edits, save_edits

        root = self.folder(name)
        for file in files:
            self.picture(name, file)
        with _changing:
            edits = load_edits(root)
            save_edits(root, {file: replace(edits.get(file, UNTOUCHED), excluded=excluded) for file in files})

    def picture(self, name: str, file: str) -> Path:
        """The path of one picture. Raises UserError when it is not a picture inside the dataset."""
        from lora_trainer.dataset.masks import is_picture

        path = confined(self.folder(name), file)
        if not path.is_file() or not is_picture(path.name):
            raise UserError(f"There is no picture {file!r} in {name}.", remedy="Reload the dataset.")
        return path

    def copy_masks_and_edits(self, name: str, target: str, files: Sequence[str]) -> None:
        """All masks, and what the editor does to these pictures, into another dataset. Raises UserError."""
        from lora_trainer.dataset.listing import list_folder
        from lora_trainer.dataset.picture_edits import load_edits, save_edits

        root, new = self.folder(name), self.folder(target)
        for file, mask in list_folder(root, links="none").masks.items():
            atomic_write(new / f"{os.path.splitext(file)[0]}.mask{mask.suffix}", mask.read_bytes())
        edits = {file: edit for file, edit in load_edits(root).items() if file in files}
        if edits:
            save_edits(new, edits)

    def was_learned_from(self, name: str) -> bool:
        """Whether a run of this server has encoded its pictures, also one that is not in the list any more."""
        from lora_trainer.dataset.cache import list_of

        return list_of(self._cache, self.folder(name).resolve()).exists()

    def add_picture(self, name: str, file: str, data: bytes, caption: str = "", numbered: bool = True) -> str:
        """Add a picture that can be trained on. Returns the name it has now.

        ``caption``: see ``add_captions``, which is quicker for many at once. ``numbered``: a name that is taken gets a
        number.

        Raises:
            NameTakenError: without ``numbered``.
            UserError: naming the file: too large, not a picture, or not a name.
        """
        from lora_trainer.dataset.masks import is_picture
        from lora_trainer.planning.measured import measure

        root = self.folder(name)
        check_name(file, "pictures")
        check_caption(file, caption)
        if not is_picture(file):
            raise UserError(f"{file} is not a kind of picture that can be read.", field="pictures",
                            remedy="Convert it to PNG, JPEG or WebP.")  # fmt: skip
        if len(data) > MAX_PICTURE_BYTES:
            raise UserError(f"{file} has {len(data) >> 20} MB; up to {MAX_PICTURE_BYTES >> 20} MB are accepted.",
                            field="pictures", remedy="Make it smaller; training scales it down anyway.")  # fmt: skip
        with _changing:
            target = _free(root, file, data)
            if target.name != file and not numbered:
                raise NameTakenError(f"There is a file {file} in {name} already.", field="pictures",
                                     remedy="Choose another name.")  # fmt: skip
            if not target.exists():
                temporary = target
                try:
                    with atomic_path(target) as temporary:
                        temporary.write_bytes(data)
                        measure(temporary)
                except UserError as error:
                    message = error.message.replace(temporary.name, file).replace(target.name, file)
                    raise UserError(message, field="pictures", remedy=error.remedy) from error.__cause__
        self.add_captions(name, {target.name: caption})
        return target.name

    def add_captions(self, name: str, captions: Mapping[str, str]) -> None:
        """Captions that came along with pictures. One that is there stays: the same pictures may come again when
        somebody has written better ones meanwhile. Raises UserError as ``write_captions`` does."""
        from lora_trainer.dataset.caption_files import read_captions
        from lora_trainer.dataset.listing import list_folder

        wanted = {file: text for file, text in captions.items() if text.strip()}
        if not wanted:
            return
        root = self.folder(name)
        there = read_captions(root, problems=[], listing=list_folder(root, links="none"))
        new = {file: text for file, text in wanted.items() if file not in there or not there[file].text.strip()}
        if new:
            self.write_captions(name, new)

    def write_captions(self, name: str, captions: Mapping[str, str]) -> None:
        """Replace captions by picture, where they were read from: metadata.csv or the text file beside the picture.

        Raises:
            UserError: a picture that is not there, or a caption that cannot be written. Nothing is written then.
        """
        from lora_trainer.dataset.writing import CaptionFolder

        root = self.folder(name)
        for file, text in captions.items():
            self.picture(name, file)
            check_caption(file, text)
        CaptionFolder(root, confined=True).write(captions)

    def thumbnail(self, picture: Path) -> Path:
        """A JPEG of at most 256 pixels a side, made once for each version of the picture. Raises UserError."""
        return self.thumbnails.get(picture)

    @property
    def thumbnails(self) -> ThumbnailCache:
        from lora_trainer.dataset.thumbnails import ThumbnailCache

        return ThumbnailCache(self._thumbnails)


def check_caption(file: str, text: str) -> None:
    """Raises UserError for a caption that cannot be written."""
    if len(text) > MAX_CAPTION_CHARACTERS or "\0" in text:
        raise UserError(
            f"The caption of {file} is longer than {MAX_CAPTION_CHARACTERS} characters, or holds a NUL.",
            field="captions",
            remedy="Shorten it; 225 tokens are read at most.",
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, links not followed."""
    for entry in _entries(Path(folder)):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        else:
            yield entry


def _move(source: Path, target: Path, failed: str, name: str) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        message = failed.format(name, error.strerror)
        raise UserError(message, field="dataset", remedy="Close what uses it and try again.") from error


def _free(root: Path, file: str, data: bytes) -> Path:
    """``root/file``; with a number when another picture, or another's caption, has the name. The same picture again
    is itself."""
    stem, suffix = os.path.splitext(file)
    stem = re.sub(r"\.mask$", "_mask", stem)
    number = 1
    while True:
        path = root / (f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}")
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
        if not path.exists() and not any(
            other.stem.casefold() == path.stem.casefold() for other in root.iterdir() if not other.name.startswith(".")
        ):
            return path
        number += 1
