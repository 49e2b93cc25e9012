"""The page's words in Python: the same localizations, chosen by name."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import lora_trainer

FOLDER = Path(lora_trainer.__file__).resolve().parents[1] / "localizations"
"""Part of the extension; a package that was installed without it speaks English."""


class Words:
    """``words(text)`` in a language, with {names} filled in.

    language: as the WebUIs or browsers name it: zh_CN, zh-Hans, zh. One that there is no localization for is English.
    """

    def __init__(self, language: str = "en"):
        name = find(language)
        self.language = "en" if name is None else name.replace("_", "-")
        self._table = {} if name is None else _table(name)

    def __call__(self, text: str, **values: object) -> str:
        found = self._table.get(text, text)
        return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), found)

    def said(self, text: str) -> str:
        """A sentence that a run said; localizations know it with {0}, {1} for what it names."""
        if text in self._table:
            return self._table[text]
        for template, pattern in _patterns(self._table):
            if found := pattern.fullmatch(text):
                return re.sub(r"\{(\d)\}", lambda place: self._part(found[int(place[1]) + 1]), self._table[template])
        return text

    def _part(self, text: str) -> str:
        """Of a sentence: another sentence, or the name of something, which stays."""
        return self.said(text) if text.endswith((".", "!", "?")) else text


def languages() -> list[str]:
    """Names of the localizations that are there."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(language: str) -> str | None:
    """The localization for a language, by its whole name or by what it begins with."""
    wanted = language.replace("-", "_").lower()
    for name in languages():
        if wanted == name.lower():
            return name
    start = wanted.partition("_")[0]
    return next((name for name in languages() if name.lower().partition("_")[0] == start), None)


@lru_cache(maxsize=4)
def _table(name: str) -> dict[str, str]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _patterns(table: dict[str, str]) -> list[tuple[str, re.Pattern[str]]]:
    """Templates and what they match, those with the most fixed letters first."""
    templates = [text for text in table if "{0}" in text]
    templates.sort(key=lambda text: -len(re.sub(r"\{\d\}", "", text)))
    found = []
    for text in templates:
        pieces = [re.escape(piece) for piece in re.split(r"\{\d\}", text)]
        found.append((text, re.compile("(.*?)".join(pieces), re.DOTALL)))
    return found
