"""Numbered backups of caption files: one zip per save, ``.lora_trainer_backups/0001.zip`` in the data folder.

They hold the files as they were before, byte for byte, and are never removed by the trainer.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path, atomic_write

BACKUP_FOLDER = ".lora_trainer_backups"

_NAME = re.compile(r"(\d{4,})\.zip")
_OUTSIDE = "outside/"  # a metadata file that lies elsewhere is kept under its name


@dataclass(frozen=True)
class Backup:
    """time: seconds since 1970. files: posix paths relative to the data folder."""

    number: int
    time: float
    files: tuple[str, ...]


def make_backup(root: Path, paths: Iterable[Path]) -> int | None:
    """Keep these files as they are now; returns the backup's number, None when none of them exists.

    Raises:
        UserError: the backup cannot be written; nothing may be overwritten then.
    """
    contents = {_inside_name(root, path): path.read_bytes() for path in paths if path.is_file()}
    if not contents:
        return None
    number, target = _reserve(root / BACKUP_FOLDER)
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return number


def list_backups(root: Path) -> list[Backup]:
    """All backups, the newest first; a damaged one is left out."""
    found = []
    for number, path in _existing(root / BACKUP_FOLDER).items():
        try:
            with zipfile.ZipFile(path) as archive:
                found.append(Backup(number, path.stat().st_mtime, tuple(archive.namelist())))
        except (OSError, zipfile.BadZipFile):
            continue
    return sorted(found, key=lambda backup: -backup.number)


def restore_backup(root: Path, number: int) -> int | None:
    """Put a backup's files back. What they replace is backed up first: returns the number of that backup.

    Raises:
        UserError: there is no such backup, or it is damaged, or a file cannot be written.
    """
    path = _existing(root / BACKUP_FOLDER).get(number)
    try:
        if path is None:
            raise FileNotFoundError
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if _is_plain(name)]
            contents = {root / name: archive.read(name) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"There is no backup {number} that can be read.", remedy="Reload the list.") from error
    before = make_backup(root, contents)
    for target, data in contents.items():
        atomic_write(target, data)
    return before


def _reserve(folder: Path) -> tuple[int, Path]:
    """The next free number, taken at once so that two savers never share one."""
    number = max(_existing(folder), default=0)
    while True:
        number += 1
        path = folder / f"{number:04d}.zip"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return number, path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"No backup can be written in {folder}: {error.strerror or error}.",
                remedy="Make the folder writable, or free some space; without a backup nothing is overwritten.",
            ) from error


def _existing(folder: Path) -> dict[int, Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}


def _inside_name(root: Path, path: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return _OUTSIDE + path.name


def _is_plain(name: str) -> bool:
    """Whether an archive's entry is a file inside the data folder that we kept."""
    parts = name.split("/")
    return not name.startswith(("/", _OUTSIDE)) and ".." not in parts and "\\" not in name and ":" not in name
