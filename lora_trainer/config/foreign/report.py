"""What became of another tool's settings: taken, without a meaning here, or not to be honored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError, shown

_LONGEST = 60  # characters of a value that are shown
_HUGE = 1e15
_AS_WRITTEN = "Give the file as its program wrote it."
_OFF = ("", "0", "0.0", "none", "null", "false", "no", "off")


@dataclass(frozen=True)
class Taken:
    """``theirs``: the setting as the other tool names it; ``ours``: the setting here, with its value."""

    theirs: str
    ours: str
    value: Any


@dataclass(frozen=True)
class Unmet:
    """A setting of the other tool that cannot be honored here, and why."""

    theirs: str
    value: Any
    reason: str


@dataclass
class Translation:
    """Another tool's settings as ours.

    tool: whose they are. form: "YAML", "TOML" or "JSON". settings: by our names. taken, ignored, unmet: what became of
    each of the other tool's
    settings. notes: what else a person should know.
    """

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unmet: list[Unmet] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    form: str = "YAML"

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Settings by our names that cannot be honored after all, each with its reason."""
        for one in [one for one in self.taken if one.ours in reasons]:
            self.taken.remove(one)
            self.unmet.append(Unmet(one.theirs, one.value, reasons[one.ours]))
        self.settings = {name: value for name, value in self.settings.items() if name not in reasons}

    def to_text(self, source: str = "The settings") -> str:
        """For a terminal, and for the comment above a converted file."""
        lines = [f"{source}: settings of {self.tool}."]
        if self.taken:
            lines.append(f"Taken ({len(self.taken)}):")
            lines += [f"  {one.theirs} -> {one.ours}: {_shown(one.value)}" for one in self.taken]
        if self.unmet:
            lines.append(f"Cannot be honored here ({len(self.unmet)}):")
            lines += [f"  {one.theirs}: {_shown(one.value)} ({one.reason})" for one in self.unmet]
        if self.ignored:
            lines.append(f"Mean nothing here ({len(self.ignored)}): {', '.join(sorted(self.ignored))}")
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "tool": f"{self.tool} ({self.form})",
            "taken": [{"theirs": one.theirs, "ours": one.ours, "value": _shown(one.value)} for one in self.taken],
            "ignored": sorted(self.ignored),
            "unmet": [{"theirs": one.theirs, "value": _shown(one.value), "reason": one.reason} for one in self.unmet],
            "notes": list(self.notes),
        }


class Reading:
    """Works through a mapping of another tool: each name is read once, and what is left at the end is reported too.

    prefix: goes before the names in the report, as ``train.`` in a nested file. folder: where files that the
    settings name may be read; None where none may, as in the tab.
    """

    def __init__(self, translation: Translation, values: Mapping[str, Any], prefix: str = "",
                 folder: Path | None = None):  # fmt: skip
        self.translation, self.prefix, self.folder = translation, prefix, folder
        self.left = {str(name): value for name, value in values.items()}

    def pop(self, name: str) -> Any:
        """The value of ``name``; None when it is not there or empty."""
        value = self.left.pop(name, None)
        return None if value == "" or value == [] else value

    def set(self, theirs: str, ours: str, value: Any) -> None:
        self.translation.settings[ours] = value
        self.translation.taken.append(Taken(self.prefix + theirs, ours, value))

    def take(self, theirs: str, ours: str, convert: Callable[[Any], Any] = lambda value: value) -> Any:
        """Take a setting that is there and not empty; ``convert`` gives our value. Returns it, or None."""
        given = theirs in self.left
        value = self.pop(theirs)
        if value is None:
            if given:
                self.translation.ignored.append(self.prefix + theirs)
            return None
        value = convert(value)
        self.set(theirs, ours, value)
        return value

    def take_all(self, names: Mapping[str, str]) -> None:
        for theirs, ours in names.items():
            self.take(theirs, ours)

    def take_unless_off(self, theirs: str, ours: str, convert: Callable[[Any], Any] = lambda value: value) -> Any:
        """The same, where 0, an empty text and false mean that it is not used."""
        if theirs in self.left and is_off(self.left[theirs]):
            self.ignore(theirs)
            return None
        return self.take(theirs, ours, convert)

    def ignore(self, *names: str) -> None:
        for name in names:
            if name in self.left:
                del self.left[name]
                self.translation.ignored.append(self.prefix + name)

    def unmet(self, name: str, value: Any, reason: str) -> None:
        self.left.pop(name, None)
        self.translation.unmet.append(Unmet(self.prefix + name, value, reason))

    def cannot(self, names: Mapping[str, str], harmless: Mapping[str, Any] | None = None) -> None:
        """Settings that have no counterpart: reported when they are on, or differ from what is ``harmless``."""
        for name, reason in names.items():
            if name not in self.left:
                continue
            value = self.left[name]
            if is_off(value) or (harmless and name in harmless and _same(value, harmless[name])):
                self.ignore(name)
            else:
                self.unmet(name, value, reason)

    def note(self, text: str) -> None:
        if text not in self.translation.notes:
            self.translation.notes.append(text)

    def finish(self, known: Iterable[str] = ()) -> None:
        """What is left: settings of our own names are taken, what is off is set aside, the rest cannot be honored."""
        for name, value in list(self.left.items()):
            if name in known:
                self.take(name, name)
            elif is_off(value):
                self.ignore(name)
            else:
                self.unmet(name, value, "nothing here has this name")


def is_off(value: Any) -> bool:
    """Whether a value says that a feature is not used: empty, zero, false, none."""
    return (
        value is None
        or value is False
        or (isinstance(value, (int, float)) and value == 0)
        or (isinstance(value, (list, dict)) and not value)
        or (isinstance(value, str) and value.strip().lower() in _OFF)
    )


def is_on(value: Any) -> bool:
    return not is_off(value)


def number(value: Any) -> Any:
    """A number where the text spells one; else what was given, about which the check of our settings speaks."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value.strip())
        except ValueError:
            continue
    return value


def computed(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` of the number that ``value`` is or spells; else what was given, as in ``number``."""
    found = number(value)
    is_one = isinstance(found, (int, float)) and not isinstance(found, bool)
    return change(found) if is_one and abs(found) < _HUGE else value


def section(value: Any, name: str) -> dict[str, Any]:
    """The mapping under ``name``; empty where nothing is given. Raises UserError for something else."""
    if is_off(value):
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{shown(value)} is not a mapping of names to values.", field=name, remedy=_AS_WRITTEN)
    return {str(key): one for key, one in value.items()}


def sections(value: Any, name: str) -> list[dict[str, Any]]:
    """The list of mappings under ``name``; empty where nothing is given. Raises UserError for something else."""
    return [section(one, name) for one in entries(value, name)]


def entries(value: Any, name: str) -> list[Any]:
    """The list under ``name``; empty where nothing is given. Raises UserError for something else."""
    if is_off(value):
        return []
    if not isinstance(value, list):
        raise UserError(f"{shown(value)} is not a list.", field=name, remedy=_AS_WRITTEN)
    return value


def find(name: Any, folder: Path | None) -> Path | None:
    """A file that settings name, beside them (in ``folder``) or from here; None where it may not be read or is not
    there."""
    if folder is None or not name:
        return None
    return next((path for path in (folder / str(name), Path(str(name))) if os.path.isfile(path)), None)


def choice(table: Mapping[str, str], reading: Reading, theirs: str, ours: str, fallback: str, hint: str = "") -> None:
    """Take one of several words by ``table`` (lower case); another one cannot be honored and becomes ``fallback``."""
    if is_off(reading.left.get(theirs)):
        reading.ignore(theirs)
        return
    word = str(reading.pop(theirs)).strip()
    if (known := table.get(word.lower())) is not None:
        reading.set(theirs, ours, known)
        return
    reading.translation.settings[ours] = fallback
    reading.unmet(theirs, word, f"{ours}: {fallback} takes its place{hint}")


def _same(value: Any, other: Any) -> bool:
    return value == other or str(value).strip().lower() == str(other).strip().lower()


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
