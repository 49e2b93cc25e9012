"""What was found of pictures when they were last decoded, so that the next start of a run need not do it again."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from lora_trainer.dataset.cache import FRESH, PICTURES, list_of
from lora_trainer.dataset.samples import Size
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write

_MASK = "mask"  # in the place of a digest: the file was decoded as a mask, which is checked less than a picture

_Stamp = tuple[int, int, int]  # size in bytes, times of the last change of content and of the file in nanoseconds


class KnownPictures:
    """Sizes and digests of intact pictures, and which masks are intact, by path, as long as a file's size and times are
    those of then.

    Kept beside the list of what the pictures of ``user`` use of the cache in ``directory``; paths in ``user`` are
    relative to it, so that they stay right when it is renamed.
    """

    def __init__(self, directory: Path, user: Path):
        self._file = list_of(directory, user).with_suffix(PICTURES)
        self._start = os.path.join(user, "")
        self._known = _read(self._file)
        self._seen: dict[str, tuple[_Stamp, Size, str]] = {}
        self._fresh = False

    def get(self, path: str) -> tuple[Size, str] | None:
        """((width, height), digest) of a picture that has not changed."""
        found = self._get(path)
        return None if found is None or found[1] == _MASK else found

    def is_intact_mask(self, path: str) -> bool:
        """Whether a mask has not changed since it was decoded."""
        found = self._get(path)
        return found is not None and found[1] == _MASK

    def _get(self, path: str) -> tuple[Size, str] | None:
        name = path.removeprefix(self._start)
        known = self._known.get(name)
        if known is None or known[0] != stamp(path):
            return None
        self._seen[name] = known
        return known[1:]

    def add(self, path: str, before: _Stamp | None, size: Size, digest: str) -> None:
        """before: the file's stamp before it was read."""
        if before is not None and time.time_ns() - max(before[1:]) > FRESH and "\n" not in path:
            self._seen[path.removeprefix(self._start)] = before, size, digest
            self._fresh = True

    def add_mask(self, path: str, before: _Stamp | None, size: Size) -> None:
        """The same of a mask that was decoded."""
        self.add(path, before, size, _MASK)

    def save(self) -> None:
        """Keep what this start has seen; the others are gone."""
        if not self._fresh and len(self._seen) == len(self._known):
            return
        lines = [
            f"{stamp[0]} {stamp[1]} {stamp[2]} {size[0]} {size[1]} {digest} {path}\n"
            for path, (stamp, size, digest) in self._seen.items()
        ]
        with suppress(UserError):  # of a full disk: they are decoded again
            atomic_write(self._file, "".join(lines).encode("utf-8", "surrogateescape"), durable=False)


def stamp(path: str) -> _Stamp | None:
    """Of a file as it is now; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(file: Path) -> dict[str, tuple[_Stamp, Size, str]]:
    known = {}
    with suppress(OSError, ValueError), open(file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            size, changed, made, width, height, digest, path = line.rstrip("\n").split(" ", 6)
            known[path] = (int(size), int(changed), int(made)), (int(width), int(height)), digest
    return known
