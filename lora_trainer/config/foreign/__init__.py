"""Settings of other trainers: recognized by their names, translated into ours, with a report of what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.config.foreign import ai_toolkit, kohya, kohya_gui, onetrainer, sd_scripts
from lora_trainer.config.foreign.formats import is_toml, parse_any
from lora_trainer.config.foreign.report import Translation
from lora_trainer.config.names import ALIASES, types

__all__ = ["Translation", "read_text", "translate"]

_OF_SD_SCRIPTS = {*kohya.SAME, *kohya.UNLESS_OFF, *kohya.CANNOT, *kohya.NOTHING, *kohya.OF_OTHER_FAMILIES,
                  *sd_scripts.NAMES}  # fmt: skip
_OURS_ALONE = set(types()) - _OF_SD_SCRIPTS
"""Settings that stand in a file of our own only."""
_NOT_OURS = _OF_SD_SCRIPTS - {*types(), *ALIASES}
"""Settings of sd-scripts that have no name here."""


def read_text(text: str, source: str = "The configuration", *, folder: Path | None = None) -> (
    tuple[dict[str, Any], Translation | None]
):  # fmt: skip
    """Settings by our names from YAML, JSON or TOML, ours or another tool's; with a report for another tool's.

    folder: of the file; what it names beside itself is read there. None reads nothing else.

    Raises:
        UserError: the text cannot be read, or says something that cannot be trained as a LoRA.
    """
    values = parse_any(text, source)
    translation = translate(values, folder, toml=is_toml(text.removeprefix("\ufeff")))
    return (values, None) if translation is None else (translation.settings, translation)


def translate(values: Mapping[str, Any], folder: Path | None = None, *, toml: bool = False) -> Translation | None:
    """Another tool's settings in our names; None where they are ours. ``toml``: as they were written."""
    known = {*types(), *ALIASES}
    names = set(values)
    if ai_toolkit.is_one(values):
        return ai_toolkit.translate(values, folder, known)
    if names & (onetrainer.MARKERS - known):
        return onetrainer.translate(values, folder, known)
    if names & (kohya_gui.MARKERS - known):
        return kohya_gui.translate(values, folder, known)
    if names & _OURS_ALONE:
        return sd_scripts.set_aside(values) if names & _NOT_OURS else None
    if toml or sd_scripts.is_dataset_config(values) or names & _NOT_OURS or {"learning_rate", "unet_lr"} <= names:
        return sd_scripts.translate(values, folder, known)
    return None
