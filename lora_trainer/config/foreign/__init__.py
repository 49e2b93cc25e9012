"""Settings of other trainers: recognized by their names, translated into ours, with a report of what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.config.foreign import ai_toolkit, kohya, kohya_flow, kohya_gui, onetrainer, sd_scripts
from lora_trainer.config.foreign.formats import form_of, is_toml, parse_any
from lora_trainer.config.foreign.report import Taken, Translation, Unmet
from lora_trainer.config.names import ALIASES, types
from lora_trainer.config.schema import TrainConfig
from lora_trainer.errors import UnreadableError, UserError, unusable

__all__ = ["Translation", "own_settings", "read_text", "read_what_can_be_read", "translate"]

_OF_SD_SCRIPTS = {*kohya.SAME, *kohya.UNLESS_OFF, *kohya.CANNOT, *kohya.NOTHING, *kohya_flow.NAMES,
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
    if translation is None:
        return values, None
    translation.form = form_of(text)
    return translation.settings, translation


def read_what_can_be_read(text: str, source: str = "The configuration", *, folder: Path | None = None) -> (
    tuple[dict[str, Any], Translation | None, list[UserError]]
):  # fmt: skip
    """``read_text``, with the problems of a text that is not valid, and what its valid entries say.

    Raises:
        UserError: nothing can be told from the text, or it says something that cannot be trained as a LoRA.
    """
    try:
        return (*read_text(text, source, folder=folder), [])
    except UnreadableError as error:
        translation = translate(error.values, folder, toml=is_toml(text.removeprefix("\ufeff")))
        return translation.settings if translation else error.values, translation, error.problems


def own_settings(values: Mapping[str, Any], text: str, elsewhere: Mapping[str, str]) -> Translation:
    """The same report for settings of this program, of those that are not at their defaults. elsewhere: those that are
    not taken, each with the reason."""
    defaults = TrainConfig()
    told = Translation("this program", dict(values), form=form_of(text))
    for name, value in values.items():
        ours = ALIASES.get(name, name)
        if ours in elsewhere:
            told.unmet.append(Unmet(name, value, elsewhere[ours]))
        elif value != getattr(defaults, ours, None):
            told.taken.append(Taken(name, ours, value))
    return told


def translate(values: Mapping[str, Any], folder: Path | None = None, *, toml: bool = False) -> Translation | None:
    """Another tool's settings in our names; None where they are ours. ``toml``: as they were written."""
    known = {*types(), *ALIASES}
    names = set(values)
    if ai_toolkit.is_one(values):
        return ai_toolkit.translate(_usable(values), folder, known)
    if names & (onetrainer.MARKERS - known):
        return onetrainer.translate(_usable(values), folder, known)
    if names & (kohya_gui.MARKERS - known):
        return kohya_gui.translate(_usable(values), folder, known)
    others = sd_scripts.has_other_forms(values)
    if names & _OURS_ALONE:
        return sd_scripts.set_aside(_usable(values)) if names & _NOT_OURS or others else None
    if toml or sd_scripts.is_dataset_config(values) or names & _NOT_OURS or {"learning_rate", "unet_lr"} <= names:
        return sd_scripts.translate(_usable(values), folder, known)
    return sd_scripts.set_aside(_usable(values)) if others else None


def _usable(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """``values``. Raises UserError where they are nested too deep, too long or too many."""
    if reason := unusable(values):
        field = next((name for name, value in values.items() if unusable(value)), None)
        raise UserError(reason, field=field, remedy="Give the file as its program wrote it.")
    return values
