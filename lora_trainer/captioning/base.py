"""What a captioner is: pictures in, a sentence or scored tags out; and how its weights are found.

A new captioner is a ``Kind`` in ``registry.py``: nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from lora_trainer.errors import UserError


@dataclass(frozen=True)
class Tag:
    """text: as the captioner writes it. score: 0…1. category: "general", "character", "rating", or a phrase list's
    name."""

    text: str
    score: float = 1.0
    category: str = "general"


@dataclass(frozen=True)
class Description:
    """What a captioner says of one picture: a sentence, tags (the likeliest first), or both."""

    sentence: str = ""
    tags: tuple[Tag, ...] = ()


class Captioner(Protocol):
    """A loaded captioner. ``describe`` may raise an out-of-memory error; ``batches`` then tries fewer at once."""

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        """One description per picture; the pictures are RGB, upright and of any size. Batches do not change it."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True)
class Settings:
    """What a person can choose about a captioner.

    device: "cpu", "cuda" … threshold, character_threshold: least score of a tag. max_length: of a sentence, in tokens.
    """

    device: str = "cpu"
    threshold: float = 0.35
    character_threshold: float = 0.6
    max_length: int = 40


@dataclass(frozen=True)
class Weights:
    """The files that a captioner needs. ``files``: every one of a tuple's alternatives will do."""

    repository: str  # on huggingface.co
    files: tuple[tuple[str, ...], ...]
    size: str  # of the download, for people

    def complete(self, folder: Path) -> bool:
        return all(any((folder / name).is_file() for name in names) for names in self.files)

    def missing(self, folder: Path) -> list[str]:
        return [names[0] for names in self.files if not any((folder / name).is_file() for name in names)]


@dataclass(frozen=True)
class Kind:
    """A captioner that can be chosen. ``load`` takes the folder with the weights; ``packages`` are imported by it and
    are not always there."""

    name: str
    title: str
    weights: Weights
    load: Callable[[Path, Settings], Captioner]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostCaptioner:
    """A captioner of the host. ``open`` loads it; called inside a turn, and never while there is a ``problem``: a host
    downloads what it misses. problem, remedy: which files are missing, how large they are and where they go."""

    title: str
    open: Callable[[Settings], Captioner]
    problem: str | None = None
    remedy: str | None = None


class Combined:
    """Several captioners as one: the first sentence, and the tags of all."""

    def __init__(self, captioners: Sequence[Captioner]):
        self._captioners = list(captioners)

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        found = [captioner.describe(images) for captioner in self._captioners]
        return [
            Description(
                sentence=next((one.sentence for one in parts if one.sentence), ""),
                tags=tuple(tag for one in parts for tag in one.tags),
            )
            for parts in zip(*found)
        ]

    def close(self) -> None:
        for captioner in self._captioners:
            captioner.close()


class UnavailableError(UserError):
    """A captioner cannot run here: its weights or a package are missing."""
