"""Text of settings that is not valid YAML or TOML: what is wrong with each entry, and the entries that are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_trainer.config.names import ALIASES, types
from lora_trainer.errors import UnreadableError, UserError, shown

_KEY = re.compile(r"[\"']?([\w.-]+)[\"']?\s*(?:[:=]|\s)")
_MOST = 20
"""So many problems are told; who has more has given no file of settings."""
_MOST_READ, _EACH = 300_000, 100
"""Characters that are parsed to find them, each parse counted for so many more; reading as many takes seconds."""


@dataclass
class Fault(Exception):
    """Why a text cannot be parsed. line: counted from 1; None where the parser does not say. remedy: None for the
    usual one. needs_others: what it refers to may stand in another entry."""

    what: str
    line: int | None = None
    remedy: str | None = None
    needs_others: bool = False


@dataclass(frozen=True)
class Form:
    """How a kind of text is read. parse: raises ``Fault``. begins: matches a line that begins an entry, whatever came
    before. remedy: how its lines look."""

    name: str
    parse: Callable[[str], dict[str, Any]]
    begins: re.Pattern[str]
    remedy: str


def parse_or_salvage(text: str, source: str, form: Form, faulty: Mapping[int, UserError]) -> dict[str, Any]:
    """The mapping in ``text``. faulty: lines that are known to be wrong, with the reason.

    Raises:
        UnreadableError: with what is wrong with each entry, by line, and what the others say.
    """
    if not faulty:
        try:
            return form.parse(text)
        except Fault as fault:
            whole = fault
    else:
        whole = Fault("", 1)
    entries, problems = _entries(text, form), dict(faulty)
    budget = _Budget(form, _MOST_READ)
    for start in sorted(entries):
        if any(start <= line < start + len(entries[start]) for line in faulty):
            del entries[start]
            continue
        if len(problems) > _MOST or budget.left < 0:
            break
        try:
            budget.parse("\n".join(entries[start]))
        except Fault as fault:
            if fault.needs_others:
                continue
            line = start - 1 + min(fault.line or 1, len(entries[start]))
            problems[line] = _problem(fault, line, entries.pop(start), start, source, form)
    values: dict[str, Any] = {}
    while len(problems) <= _MOST and budget.left >= 0:
        try:
            values = budget.parse(_joined(entries))
            break
        except Fault as fault:
            line = fault.line or 0
            place = next((at for at in entries if at <= line < at + len(entries[at])), None)
            if place is None:
                break
            problems[line] = _problem(fault, line, entries.pop(place), place, source, form)
    if not problems:  # each entry is right by itself, and all together are not
        problems[whole.line or 1] = _problem(whole, whole.line or 1, text.splitlines() or [""], 1, source, form)
    raise UnreadableError([problems[line] for line in sorted(problems)][:_MOST], values)


@dataclass
class _Budget:
    """Parses until so many characters are ``left``; below 0 it is used up."""

    form: Form
    left: int

    def parse(self, text: str) -> dict[str, Any]:
        self.left -= len(text) + _EACH
        return self.form.parse(text)


def _entries(text: str, form: Form) -> dict[int, list[str]]:
    """Lines of each entry, by the number of the first."""
    entries: dict[int, list[str]] = {}
    start = brackets = 0
    quotes = [0, 0]
    for number, line in enumerate(text.split("\n"), start=1):
        outside = line[:1] not in ("", " ", "\t", "#", "-", "]", "}", "\r")
        is_open = brackets > 0 or any(count % 2 for count in quotes)  # over several lines
        if not entries or form.begins.match(line) or (outside and not is_open):
            start, brackets, quotes = number, 0, [0, 0]
            entries[start] = []
        entries[start].append(line)
        brackets += sum(line.count(one) for one in "[{") - sum(line.count(one) for one in "]}")
        quotes = [count + line.count(one) for count, one in zip(quotes, ('"""', "'''"))]
    return entries


def _joined(entries: Mapping[int, list[str]]) -> str:
    """The entries in their lines; where one is left out, empty lines."""
    lines: list[str] = []
    for start, entry in sorted(entries.items()):
        lines += [""] * (start - 1 - len(lines)) + entry
    return "\n".join(lines)


def _problem(fault: Fault, line: int, entry: list[str], start: int, source: str, form: Form) -> UserError:
    named = _KEY.match(entry[0])
    name = named[1] if named and (named[1] in types() or named[1] in ALIASES) else None
    said = shown(entry[min(line - start, len(entry) - 1)].strip(), 80)
    return UserError(
        f"{source} cannot be read as {form.name} (line {line}): {fault.what}, in {said}.",
        field=name,
        remedy=fault.remedy or form.remedy,
    )
