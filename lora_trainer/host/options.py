"""Reads a WebUI's command line and its settings; A1111 and Forge agree in all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_trainer.errors import UserError
from lora_trainer.host.base import AccessPolicy

FOLDERS_OPTION = "lora_trainer_folders"
NAMES_OPTION = "lora_trainer_names"
LANGUAGE_OPTION = "lora_trainer_language_models"


class WebuiOptions:
    """The WebUI's ``opts``; an option that is not registered has its default."""

    def __init__(self, opts: Any):
        self._opts = opts

    def get(self, key: str, default: object) -> object:
        return getattr(self._opts, key, default)


def data_folder(options: Any, data_path: Path, lora: Path | None) -> Path:
    """``--lora-trainer-dir``, by default ``lora_trainer`` in the WebUI's data folder.

    Raises:
        UserError: it lies in the LoRA folder, where the WebUI would list training states as LoRAs.
    """
    chosen = getattr(options, "lora_trainer_dir", None)
    folder = Path(chosen).expanduser() if chosen else data_path / "lora_trainer"
    folder = folder.resolve()
    if lora is not None and (folder == lora.resolve() or lora.resolve() in folder.parents):
        raise UserError(
            f"--lora-trainer-dir {folder} lies in the LoRA folder.", remedy="Choose a folder outside of it."
        )
    return folder


def access_policy(options: Any, folders: str, names: str = "") -> AccessPolicy:
    """Who may do what from outside.

    folders: one path a line, the server's folders that callers of a WebUI reachable from elsewhere may name.
    names: one a line, under which a proxy makes a WebUI known that listens to its own machine alone; those of
        --cors-allow-origins are known, too.
    """
    credentials = None
    if getattr(options, "api_auth", None):
        pairs = (pair.partition(":") for pair in options.api_auth.split(","))
        credentials = {user: password for user, _, password in pairs}
    roots = None
    if is_reachable_from_elsewhere(options):
        roots = tuple(named_folders(folders))
    origins = (getattr(options, "cors_allow_origins", None) or "").split(",")
    known = tuple(filter(None, (_name(text) for text in (*names.splitlines(), *origins))))
    return AccessPolicy(credentials, roots, bool(getattr(options, "hide_ui_dir_config", False)), known)


def _name(text: str) -> str:
    """The name of a server in a line of the settings, which may be a whole address."""
    text = text.strip()
    try:
        return urlsplit(text if "://" in text else f"//{text}").hostname or ""
    except ValueError:
        return ""


def named_folders(lines: str) -> Iterator[Path]:
    """The folders that a setting names, one a line."""
    yield from filter(None, map(_folder, lines.splitlines()))


def _folder(line: str) -> Path | None:
    """The folder that a line of the settings names; None for none, and for what cannot be one (~nobody, a circle of
    links): a slip there must not shut everybody out."""
    try:
        return Path(line.strip()).expanduser().resolve() if line.strip() else None
    except (OSError, RuntimeError, ValueError):
        return None


def is_reachable_from_elsewhere(options: Any) -> bool:
    if any(getattr(options, name, None) for name in ("share", "listen", "ngrok", "server_name", "webui_is_non_local")):
        return True
    # Without its page the WebUI gives uvicorn no address to bind, which then takes all.
    return bool(getattr(options, "nowebui", False))
