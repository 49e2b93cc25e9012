"""The presets that people save: one YAML file each under ``<data>/presets``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.config import TrainConfig, from_mapping, parse_yaml, settings_where, to_mapping
from lora_trainer.config.names import ALIASES
from lora_trainer.errors import UserError, problems_of
from lora_trainer.files import atomic_write, safe_name_problem
from lora_trainer.planning.presets import PRESETS
from lora_trainer.workspace.paths import check_name, confined

HELD = frozenset(
    settings_where(lambda facts: facts.path is None and facts.given_by in ("form", "file"))
) - {"overwrite", "description"}  # fmt: skip
"""What a preset may set: nothing that belongs to one LoRA, its name and pictures above all, and no path."""

_MAX_BYTES = 64 << 10
_MAX_FILES = 500


@dataclass(frozen=True)
class OwnPreset:
    """kind: of ``PRESETS``, which gives what ``settings`` leaves out; None where they are complete. problem: why the
    file cannot be used."""

    name: str
    kind: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class OwnPresets:
    """Reads, saves, renames and deletes them. A file may have come from anywhere: it is checked whenever it is read."""

    def __init__(self, data: Path):
        self.root = Path(data) / "presets"

    def presets(self) -> list[OwnPreset]:
        """Every preset, by name; one whose file is no preset has the problem instead of settings."""
        try:
            names = [Path(entry.name).stem for entry in os.scandir(self.root) if entry.name.endswith(".yaml")]
        except FileNotFoundError:
            return []
        usable = sorted((name for name in names if safe_name_problem(name) is None), key=str.casefold)
        return [self._read(name) for name in usable[:_MAX_FILES]]

    def save(
        self, name: str, kind: str | None, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> OwnPreset:
        """Save the settings that a preset may hold; the others are left out.

        Raises:
            UserError, ConfigError: the name is taken or cannot be one, or a setting is not valid.
        """
        path = self._path(name)
        if not overwrite and (taken := self._taken(name)):
            raise UserError(f"There is a preset {taken} already.", field="name", remedy="Choose another name.")
        held = {name: value for name, value in settings.items() if ALIASES.get(name, name) in HELD}
        preset = _checked(name, kind, held)
        content = {"kind": preset.kind, "settings": preset.settings}
        atomic_write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
        return preset

    def rename(self, name: str, new: str) -> None:
        """Raises UserError where there is none of this name, or the new one is taken or cannot be one."""
        path, target = self._existing(name), self._path(new)
        taken = self._taken(new)
        if taken and taken.casefold() != name.casefold():
            raise UserError(f"There is a preset {taken} already.", field="name", remedy="Choose another name.")
        os.rename(path, target)

    def delete(self, name: str) -> None:
        """Raises UserError where there is none of this name."""
        self._existing(name).unlink()

    def _path(self, name: str) -> Path:
        return confined(self.root, f"{check_name(name, 'name')}.yaml")

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise UserError(f"There is no preset {name}.", field="name", remedy="Reload the list.")
        return path

    def _taken(self, name: str) -> str | None:
        """The preset of this name, whatever the case of its letters: some systems see no difference."""
        names = (preset.name for preset in self.presets())
        return next((one for one in names if one.casefold() == name.casefold()), None)

    def _read(self, name: str) -> OwnPreset:
        try:
            path = self._existing(name)
            if path.stat().st_size > _MAX_BYTES:
                raise UserError(f"{name} is larger than {_MAX_BYTES >> 10} KB.")
            content = parse_yaml(_without_aliases(name, path.read_text(encoding="utf-8")))
            settings = content.get("settings")
            if not isinstance(settings, dict) or content.keys() - {"kind", "settings"}:
                raise UserError(f"{name} is no preset.", remedy="Save it anew.")
            if foreign := sorted(str(one) for one in settings if ALIASES.get(one, one) not in HELD):
                raise UserError(f"{name} sets what a preset may not: {', '.join(foreign)}.", remedy="Save it anew.")
            return _checked(name, content.get("kind"), settings)
        except UserError as error:
            said = [f"{it.field}: {it.message}" if it.field else it.message for it in problems_of(error)]
            return OwnPreset(name, problem=" ".join(said))
        except (OSError, UnicodeDecodeError) as error:
            return OwnPreset(name, problem=f"{name} cannot be read: {error}.")


def _without_aliases(name: str, text: str) -> str:
    """A few lines of aliases can stand for gigabytes."""
    try:
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        return text  # whose reader says what is wrong
    if aliases:
        raise UserError(f"{name} is no preset.", remedy="Save it anew.")
    return text


def _checked(name: str, kind: Any, settings: Mapping[str, Any]) -> OwnPreset:
    """Raises UserError, ConfigError for what no form could send."""
    if kind is not None and kind not in list(PRESETS):
        raise UserError(f"There is no preset {kind!r}.", field="kind", remedy=f"Use one of {', '.join(PRESETS)}.")
    values = to_mapping(from_mapping(settings))
    given = [ALIASES.get(one, one) for one in settings]
    default = to_mapping(TrainConfig())
    complete = kind is None
    kept = {one: values[one] for one in given if not complete or values[one] != default[one]}
    return OwnPreset(name, kind, kept)
