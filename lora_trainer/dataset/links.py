"""Which links to files of a data folder are followed: nobody's other texts become captions."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_trainer.dataset.images import IMAGE_EXTENSIONS
from lora_trainer.dataset.keys import folder_of, name_of, stem_of
from lora_trainer.files import is_of_the_system

Links = Literal["none", "pictures", "all"]
"""To files outside of a data folder that are followed. "pictures": those of pictures, and those of a caption or mask
that lies to its linked picture there as it does here. "all", for who edits the own files. "none" follows no link out
of the folder, to folders neither."""


@dataclass(frozen=True)
class Link:
    """target: the resolved path that it leads to. home: that of the data folder, or of the linked folder in it, in
    which the link lies."""

    target: str
    home: str


def not_followed(links: Mapping[str, Link], root: str, pictures: Collection[str], policy: Links) -> set[str]:
    """Of the links to files, by key, those that are left out.

    root: the resolved path of the data folder. pictures: keys of training pictures.
    """
    if policy == "all":
        return set()
    if policy == "none":
        return {key for key, link in links.items() if not is_within(root, link.target)}
    away = {key: link for key, link in links.items() if not _is_at_home(link, root)}
    linked: dict[str, list[tuple[str, str]]] = {}
    for key in away.keys() & set(pictures):
        linked.setdefault(stem_of(name_of(key)), []).append((folder_of(key), away[key].target))
    return {
        key
        for key, link in away.items()
        if is_of_the_system(Path(link.target)) or not (key in pictures or _goes_with(key, link.target, linked))
    }


def _is_at_home(link: Link, root: str) -> bool:
    if is_within(root, link.target) or is_within(link.home, link.target):
        return True
    # The cache of Hugging Face's hub is made of links: <repository>/snapshots/<revision>/a.png -> <repository>/blobs/…
    repository, _, _ = link.home.rpartition(f"{os.sep}snapshots{os.sep}")
    return bool(repository) and is_within(os.path.join(repository, "blobs"), link.target)


def _goes_with(key: str, target: str, linked: Mapping[str, Sequence[tuple[str, str]]]) -> bool:
    """Whether a link of a caption or mask leads to what lies to its picture as it does here, where that is a link too.

    A caption lies beside its picture, a mask perhaps in a folder near it. linked: name of a linked picture, without its
    ending -> its folder in the data folder and its resolved path, for each.
    """
    folder, name = folder_of(key), name_of(key)
    for length in range(1, len(name) + 1):
        for of, picture in linked.get(name[:length], ()):
            if of != folder and not name.lower().endswith(IMAGE_EXTENSIONS):
                continue
            home, stem = os.path.split(os.path.splitext(picture)[0])
            way = os.path.relpath(folder or ".", of or ".")
            if target == os.path.normpath(os.path.join(home, way, stem + name[length:])):
                return True
    return False


def is_within(folder: str, path: str) -> bool:
    """Whether a resolved path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
