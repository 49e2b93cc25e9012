"""Putting a LoRA into a folder that a WebUI lists: the file, its card and its picture."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.files import atomic_path, atomic_write, safe_name_problem
from lora_trainer.host.base import Card
from lora_trainer.run.outputs import run_of

_RESERVED = {"none", "addams"}  # names that the WebUIs' Lora extension never finds by themselves


def place_lora(lora: Path, folder: Path, name: str, card: Card, *, overwrite: bool = False) -> Path:
    """Copy ``lora`` to ``folder/name.safetensors``, with ``name.json`` and ``name.preview.png`` beside it.

    Each file appears whole or not at all; the LoRA itself comes last, so that it is never seen without its card.
    A name in use in some sub-folder is taken too, because the picker knows a LoRA by its name alone. An earlier version
    that the same run wrote is replaced where it lies. Fields of an earlier card that ours does not fill (a person's
    own, say) are kept.

    Raises:
        UserError: naming ``output_name`` when it cannot be a name, or is taken and not ``overwrite``; or the folder
            cannot be written.
    """
    problem = safe_name_problem(name) or ("the WebUI keeps it for itself" if is_reserved(name) else None)
    if problem:
        raise UserError(f"{name!r} cannot be a name: {problem}.", field="output_name", remedy="Choose another name.")
    path, json_path, picture = _files(folder, name)
    known = _of_this_name(folder, name)
    earlier = known and run_of(lora) is not None and all(run_of(other) == run_of(lora) for other in known)
    if not overwrite and not earlier and is_taken(folder, name):
        raise UserError(
            f"There is a LoRA {name} already.", field="output_name", remedy="Choose another name, or allow overwriting."
        )
    elsewhere = [other for other in known if other.name == path.name]
    if not path.exists() and elsewhere:
        path = elsewhere[0]  # to be overwritten where it lies
        json_path, picture = (path.with_name(f"{name}{end}") for end in (".json", ".preview.png"))
    if card.thumbnail is not None:
        with atomic_path(picture) as temporary:
            card.thumbnail.save(temporary, format="PNG")
    fields = existing_card(json_path) | card_fields(card)
    atomic_write(json_path, json.dumps(fields, ensure_ascii=False, indent=4))
    if lora.resolve() != path.resolve():
        with atomic_path(path) as temporary:
            shutil.copyfile(lora, temporary)
    return path


def is_reserved(name: str) -> bool:
    """Whether the WebUIs would never find a LoRA of this name."""
    return name.casefold() in _RESERVED


def is_taken(folder: Path, name: str) -> bool:
    """Whether a LoRA cannot be put there under ``name`` without replacing something."""
    return bool(_of_this_name(folder, name)) or any(path.exists() for path in _files(folder, name))


def _files(folder: Path, name: str) -> tuple[Path, Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json", folder / f"{name}.preview.png"


def _of_this_name(folder: Path, name: str) -> list[Path]:
    return [other for other in loras_on_disk(folder) if other.stem.casefold() == name.casefold()]


def loras_on_disk(folder: Path) -> list[Path]:
    """Every LoRA file below ``folder``."""
    return sorted(
        Path(place, file)
        for place, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith((".safetensors", ".pt", ".ckpt"))
    )


def card_fields(card: Card) -> dict[str, Any]:
    """The card as the WebUIs' user-metadata files have it."""
    fields = {
        "description": card.description,
        "sd version": card.sd_version,
        "activation text": card.activation_text,
        "preferred weight": card.preferred_weight,
        "negative text": card.negative_text,
        "notes": card.notes,
    }
    return {key: value for key, value in fields.items() if value != ""}


def existing_card(path: Path) -> dict[str, Any]:
    """The card in a .json file beside a LoRA; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
