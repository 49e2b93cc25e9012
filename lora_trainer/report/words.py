"""The page's words in Python: the same localizations, chosen by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import lora_trainer

FOLDER = Path(lora_trainer.__file__).resolve().parents[1] / "localizations"
"""Part of the extension; a package that was installed without it speaks English."""

# As in javascript/lora_trainer.js.
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_ACROSS = re.compile(r"[.!?] [A-Z]|\n")
_REASON = re.compile(r"^(its?|is|an?|the|there|in|quantized) |[.!?]\Z|\n")


class Words:
    """``words(text)`` in a language, with {names} filled in.

    language: as the WebUIs or browsers name it: zh_CN, zh-Hans, zh. One that there is no localization for is English.
    """

    def __init__(self, language: str = "en"):
        self._name = name = find(language)
        self.language = "en" if name is None else name.replace("_", "-")
        self._table = {} if name is None else _table(name)

    def __call__(self, text: str, **values: object) -> str:
        found = self._table.get(text, text)
        return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), found)

    def said(self, text: str) -> str:
        """A sentence that a run said; localizations know it with {0}, {1} for what it names."""
        if self._name is None or text in self._table:
            return self._table.get(text, text)
        sentences = _BETWEEN_SENTENCES.sub("\n", text).split("\n")
        across = None  # where a name would hold the end of a sentence: more likely these are several sentences
        for template, pattern in _patterns(self._name):
            if found := pattern.fullmatch(text):
                filled = self._filled(self._table[template], found.groups())
                if not any(_ACROSS.search(part) for part in found.groups()):
                    return filled
                across = across or filled
        each = [self.said(one) for one in sentences] if len(sentences) > 1 else []
        joined = ("\n" if "\n" in text else " ").join(each)
        if each and all(one != before for one, before in zip(each, sentences)):
            return joined
        return self._placed(text) or across or joined or text

    def _filled(self, translated: str, parts: Sequence[str]) -> str:
        return re.sub(r"\{(\d)\}", lambda place: self._part(parts[int(place[1])]), translated)

    def _placed(self, text: str) -> str:
        """A sentence behind the place that it is about, such as "metadata.csv, line 3: …"; empty for another text."""
        place, _, what = text.partition(": ")
        if "\n" in text or _ACROSS.search(place):
            return ""
        translated = self.said(what) if what else what
        return f"{self.said(place)}{self(': ')}{translated}" if translated != what else ""

    def _part(self, text: str) -> str:
        """Of a sentence: a reason, another sentence, or the name of something, which stays.

        Of reasons that begin otherwise those of three words and more are known: no name is likely to be one.
        """
        if _REASON.search(text) or (text.count(" ") > 1 and text in self._table):
            return self.said(text)
        return re.sub(r"and \d+ more\Z", lambda rest: self.said(rest[0]), text)  # the end of a list


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


@lru_cache(maxsize=4)
def _patterns(name: str) -> list[tuple[str, re.Pattern[str]]]:
    """Templates of a localization and what they match, those with the most fixed letters first."""
    templates = [text for text in _table(name) if "{0}" in text]
    templates.sort(key=lambda text: -len(re.sub(r"\{\d\}", "", text)))
    found = []
    for text in templates:
        pieces = [re.escape(piece) for piece in re.split(r"\{\d\}", text)]
        # Lines are numbers: "{0}, line {1}" is a place, and what comes behind it is not.
        expression = re.sub(r"\b([Ll]ine\\ )\(.*?\)", r"\1(\\d+)", "(.*?)".join(pieces))
        found.append((text, re.compile(expression, re.DOTALL)))
    return found
