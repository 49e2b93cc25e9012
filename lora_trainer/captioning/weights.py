"""Where captioners' weights are: in a folder, or in Hugging Face's cache. Nothing is downloaded unless asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lora_trainer.captioning.base import Kind, UnavailableError, Weights
from lora_trainer.errors import UserError

FOLDER_VARIABLE = "LORA_TRAINER_CAPTIONERS"
"""Environment variable: a folder with one sub-folder per captioner, besides those that the caller names."""


def find(kind: Kind, folders: Sequence[Path] = (), given: Path | None = None) -> Path:
    """The folder with a captioner's weights.

    given: this one and no other. folders: each may hold ``<name>/`` with the files; then Hugging Face's cache.

    Raises:
        UnavailableError: says which files are missing, where to put them and how large they are.
    """
    weights = kind.weights
    if given is not None:
        if weights.complete(given):
            return given
        raise UnavailableError(
            f"{given} lacks {', '.join(weights.missing(given))} of the captioner {kind.name}.",
            field="weights",
            remedy=f"Give the folder with the files of {weights.repository}.",
        )
    for folder in _folders(folders):
        if weights.complete(folder / kind.name):
            return folder / kind.name
    cached = _cached(weights)
    if cached is not None:
        return cached
    raise _missing(kind, folders)


def download(kind: Kind) -> Path:
    """Fetch a captioner's weights into Hugging Face's cache, because a person asked for it.

    Raises:
        UserError: there is no connection, or the download failed.
    """
    from huggingface_hub import hf_hub_download

    weights = kind.weights
    try:
        for names in weights.files:
            path = _first_of(weights.repository, names, hf_hub_download)
    except Exception as error:
        raise UserError(
            f"{weights.repository} could not be downloaded: {' '.join(str(error).split())[:300]}",
            remedy="Check the connection, or put the files there by hand.",
        ) from error
    return Path(path).parent


def _first_of(repository: str, names: tuple[str, ...], fetch: object) -> str:
    for name in names[:-1]:
        try:
            return fetch(repository, name)  # type: ignore[operator]
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) != 404:
                raise
    return fetch(repository, names[-1])  # type: ignore[operator]


def _folders(folders: Sequence[Path]) -> list[Path]:
    own = os.environ.get(FOLDER_VARIABLE)
    return [*map(Path, folders), *([Path(own)] if own else [])]


def _cached(weights: Weights) -> Path | None:
    """The newest snapshot in the cache that has every file."""
    from huggingface_hub import try_to_load_from_cache

    for name in weights.files[0]:
        path = try_to_load_from_cache(weights.repository, name)
        if isinstance(path, str) and weights.complete(Path(path).parent):
            return Path(path).parent
    return None


def _missing(kind: Kind, folders: Sequence[Path]) -> UnavailableError:
    weights = kind.weights
    files = ", ".join(names[0] for names in weights.files)
    searched = _folders(folders)
    place = searched[0] / kind.name if searched else "a folder named with --weights"
    return UnavailableError(
        f"The weights of the captioner {kind.name} ({kind.title}) are not on this machine: {files} ({weights.size}).",
        field="captioner",
        remedy=f"Put the files of huggingface.co/{weights.repository} into {place}, or let "
        "`python -m lora_trainer caption … --download` fetch them.",
    )
