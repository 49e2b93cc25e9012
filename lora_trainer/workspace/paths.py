"""Which files and folders a remote caller may name."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_trainer
from lora_trainer import plugins
from lora_trainer.config import FACTS, TrainConfig, with_folder
from lora_trainer.errors import ConfigError, UserError, shown
from lora_trainer.files import is_of_the_system, safe_name_problem

if TYPE_CHECKING:
    from lora_trainer.host.base import AccessPolicy

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # and halves of characters
_LONGEST = 1000
_DRIVE = re.compile(r"^[A-Za-z]:")

DATASETS = ("train_data_dir", "opposite_dir")
"""Settings that may name a dataset of the library."""

_REFUSED = "This path may not be used here."


def confined(root: Path, relative: str) -> Path:
    """The file ``relative`` names inside ``root``, links resolved. Need not exist.

    Refused are absolute paths of any system, drives, backslashes, ``..``, control characters, and links that lead out
    of ``root``.

    Raises:
        UserError: whatever the reason, with the same words, so that nobody learns what exists outside.
    """
    refused = UserError(_REFUSED, remedy="Name a file inside the folder, such as pictures/01.png.")
    if not 0 < len(relative) <= _LONGEST or _CONTROL.search(relative) or "\\" in relative or _DRIVE.match(relative):
        raise refused
    if relative.startswith(("/", "~")) or any(part in ("", ".", "..") for part in relative.split("/")):
        raise refused
    try:
        path = (root / relative).resolve()
        inside = _is_inside(path, root.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, a circle of links
        raise refused from None
    if not inside:
        raise refused
    return path


def allowed(text: str, data: Path, access: AccessPolicy, field: str | None = None) -> Path:
    """A path of this machine as a caller gave it, resolved, when the host lets callers name it.

    The trainer's own folder is always allowed; with ``hide_paths`` nothing else is. Folders of the operating system
    are refused unless whoever runs the WebUI named them.

    Raises:
        UserError: naming ``field``.
    """
    hidden = "Folders of the server may not be named here."
    refused = UserError(
        hidden if access.hide_paths else f"{shown(text)} may not be used here.",
        field=field,
        remedy="Upload the pictures, or ask whoever runs this WebUI to allow the folder.",
    )
    if not text or _CONTROL.search(text):
        raise refused
    try:
        path = Path(text).expanduser().resolve()
        path.exists()  # raises for a name that is too long
        own = _is_inside(path, data.resolve())
    except (OSError, RuntimeError, ValueError):
        raise refused from None
    if own:
        return path
    named = access.roots is not None and any(_is_inside(path, root.resolve()) for root in access.roots)
    if access.hide_paths or (access.roots is not None and not named):
        raise refused
    if not named and is_of_the_system(path):
        raise UserError(f"{text} belongs to the system.", field=field, remedy="Choose another folder.")
    return path


def check_name(name: str, field: str) -> str:
    """``name`` when it can be a file's name everywhere. Raises UserError naming ``field``."""
    problem = "it holds control characters" if _CONTROL.search(name) else safe_name_problem(name)
    if problem:
        raise UserError(f"{name[:80]!r} cannot be a name: {problem}.", field=field, remedy="Choose another name.")
    return name


def confine_config(
    config: TrainConfig, data: Path, access: AccessPolicy, known_models: Collection[str] = ()
) -> TrainConfig:
    """``config`` with every path resolved and checked; a dataset of the library may be given by its name, a base
    model as one of ``known_models`` (the host's list).

    Raises:
        ConfigError: with every path that may not be used, each naming its field; its ``config`` is without them.
    """
    problems: list[UserError] = []
    values: dict[str, Any] = {}

    def check(field: str, text: str | list[str]) -> None:
        def confine(path: str) -> str:
            return str(allowed(path, data, access, field))

        try:
            values[field] = confine(text) if isinstance(text, str) else [with_folder(one, confine) for one in text]
        except UserError as error:
            problems.append(error)

    for field, facts in FACTS.items():
        text = getattr(config, field)
        if facts.path is None or facts.given_by == "job" or not text or text in facts.words:
            continue
        if facts.or_name and _is_plain_name(text):
            continue  # the host looks it up in its own list; without a folder it leads nowhere else
        if field == "base_model" and text in known_models:
            continue
        if field in DATASETS and _is_plain_name(text) and (data / "datasets" / text).is_dir():
            text = str(data / "datasets" / text)
        if field == "plugins":
            problems += _unloaded(text)
        else:
            check(field, text)
    if config.trust_remote_code:  # a model's code is code as plug-ins are
        remedy = "Train this model from the command line."
        problems.append(UserError("It is not accepted from here.", field="trust_remote_code", remedy=remedy))
    if problems:
        defaults = TrainConfig()
        usual = {problem.field: getattr(defaults, problem.field) for problem in problems if problem.field}
        raise ConfigError(problems, dataclasses.replace(config, **values, **usual))
    return dataclasses.replace(config, **values)


def _unloaded(paths: str | Sequence[str]) -> list[UserError]:
    """A plug-in is code: callers may name only those that whoever runs the trainer has loaded."""
    return [
        UserError(
            f"The plug-in {path} is not loaded here.",
            field="plugins",
            remedy=f"Whoever runs this WebUI can name it in the environment variable {plugins.VARIABLE}.",
        )
        for path in ([paths] if isinstance(paths, str) else paths)
        if not plugins.is_loaded(path)
    ]


def _is_plain_name(text: str) -> bool:
    return safe_name_problem(text) is None


def redact(text: str, data: Path, lora: Path | None, language_models: Sequence[Path] = ()) -> str:
    """``text`` without the server's folders, for callers who are not to see them."""
    own = Path(lora_trainer.__file__).parents[1]
    home = Path(os.path.expanduser("~"))  # Path.home() raises for a user without one, as in some containers
    models = [(folder, "<LLM>") for folder in language_models]
    for folder, word in ((data, "<trainer>"), (lora, "<Lora>"), *models, (own, "<extension>"), (home, "~")):
        if folder is not None:
            for form in {str(folder), str(folder.resolve())} - {"/"}:
                text = text.replace(form, word)
    return text


def _is_inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents
