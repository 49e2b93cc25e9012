"""From what a captioner says to a caption.

In this order: normalize, drop ratings and the blacklist, replace synonyms, underscores to spaces, drop what other tags
imply, what the preset leaves out, duplicates; then the trigger word first, the cap, the template.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lora_trainer.captioning.base import Description
from lora_trainer.captioning.presets import caption_preset
from lora_trainer.errors import UserError

ARTICLE_TEMPLATE = "**{caption}**, high quality, detailed"
KAOMOJI = frozenset(
    (
        "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
        "o_o", "u_u", "x_x", "|_|", "||_||",
    )
)  # fmt: skip
"""Tags that are faces: their underscores stay."""

_IMPLIED_BY = {
    "hat": ("baseball cap", "beret", "witch hat"),
    "animal ears": ("cat ears", "dog ears", "fox ears", "rabbit ears", "wolf ears"),
    "tree": ("forest",),
    "sky": ("clear sky", "cloudy sky", "starry sky"),
}
"""Tags that say nothing beside one of these. A tag's last words imply themselves: ``hat`` beside ``red hat``."""

_LONGEST = {"template": 2000, "trigger_word": 500, "replacements": 200_000}  # characters
_SLIPS = re.compile(r"\b(?:arafed|araffed?|araffes?)\s+", re.IGNORECASE)  # words that BLIP makes up
_REPEATED = re.compile(r"\b(\w+(?: \w+){0,3})(?: \1\b)+", re.IGNORECASE)
_FILLER = re.compile(r"^(?:there (?:is|are)|this is|a view of)\s+", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"(\*{1,3})\{caption\}\1|\{caption\}")


@dataclass(frozen=True)
class CaptionOptions:
    """template: the caption with ``{caption}`` where the description goes, marks around it go to each part of it.
    trigger_word: put first. kind: a preset's name. keep_all: leave nothing out for the preset's sake.
    blacklist: globs of tags. replacements: tag -> what to write for it, or "" for nothing.
    max_parts: the most parts that a description keeps, the likeliest ones.
    """

    template: str = "{caption}"
    trigger_word: str = ""
    kind: str = ""
    keep_all: bool = False
    blacklist: tuple[str, ...] = ()
    replacements: Mapping[str, str] = field(default_factory=dict)
    max_parts: int = 40

    def check(self) -> None:
        """Raises UserError for a template without a place for the description, or an unknown kind."""
        caption_preset(self.kind)
        if "{caption}" not in self.template:
            raise UserError(
                f"The template {self.template!r} has no {{caption}}.", field="template",
                remedy=f"Write it where the description goes: {ARTICLE_TEMPLATE}",
            )  # fmt: skip
        lists = (*self.blacklist, *self.replacements, *self.replacements.values())
        for setting, size in (("template", len(self.template)), ("trigger_word", len(self.trigger_word)),
                            ("replacements", sum(map(len, lists)))):  # fmt: skip
            if size > _LONGEST[setting]:
                longest = _LONGEST[setting]
                raise UserError(f"It has more than {longest} characters.", field=setting, remedy="Shorten it.")
        if self.max_parts < 1:
            raise UserError("A caption needs at least one part.", field="max_tags", remedy="Use 1 or more.")


def make_caption(description: Description, options: CaptionOptions, escape: Callable[[str], str]) -> str:
    """The caption to write; "" when nothing was left to say.

    escape: writes plain text so that no character of it is taken for a mark (``dataset.captions.escape``).
    """
    parts = describe_parts(description, options)
    trigger = options.trigger_word.strip()
    parts = [part for part in parts if _plain(part) != _plain(trigger)][: options.max_parts]
    if not parts:
        return escape(trigger) if trigger else ""
    escaped = [escape(part) for part in parts]

    def fill(match: re.Match[str]) -> str:
        marks = match[1] or ""
        return ", ".join(f"{marks}{part}{marks}" for part in escaped)

    caption = _PLACEHOLDER.sub(fill, options.template.strip())
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        caption = f"{escape(trigger)}, {caption}"
    return caption


def describe_parts(description: Description, options: CaptionOptions) -> list[str]:
    """The parts of a caption as plain text: the sentence first, then the tags."""
    preset = caption_preset("" if options.keep_all else options.kind)
    replacements = {_plain(_spaced(tag)): text for tag, text in options.replacements.items()}
    blacklist = tuple(_plain(_spaced(glob)) for glob in options.blacklist)

    tags: list[str] = []
    for tag in description.tags:
        text = _normalize(tag.text)
        if not text or tag.category == "rating" or _matches(_spaced(text), blacklist):
            continue
        text = _spaced(replacements.get(_plain(_spaced(text)), text))
        if text and tag.category not in preset.categories:
            tags.append(text)
    plain = {_plain(text) for text in tags}
    tags = [text for text in tags if not _is_implied(_plain(text), plain)]
    tags = [text for text in tags if not _matches(text, preset.removes)]
    tags.sort(key=lambda text: not _matches(text, preset.first))  # stable: the likeliest stay first

    sentence = _tidy_sentence(description.sentence, preset.cuts)
    parts = [sentence] if sentence else []
    seen = {_plain(sentence)}
    for text in tags:
        if _plain(text) not in seen and not _stands_in(_plain(text), _plain(sentence)):
            seen.add(_plain(text))
            parts.append(text)
    return parts


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).replace(",", " ").split())


def _spaced(text: str) -> str:
    return text if text in KAOMOJI else text.replace("_", " ").strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _matches(text: str, globs: tuple[str, ...]) -> bool:
    text = _plain(text)
    return any(fnmatchcase(text, glob) for glob in globs)


def _is_implied(tag: str, tags: set[str]) -> bool:
    if any(other.endswith(f" {tag}") for other in tags):
        return True
    return any(other in tags for other in _IMPLIED_BY.get(tag, ()))


def _stands_in(tag: str, sentence: str) -> bool:
    return bool(sentence) and re.search(rf"(?<!\w){re.escape(tag)}(?!\w)", sentence) is not None


def _tidy_sentence(sentence: str, cuts: tuple[str, ...]) -> str:
    sentence = " ".join(unicodedata.normalize("NFC", sentence).split()).strip(" .,")
    sentence = _SLIPS.sub("", _FILLER.sub("", sentence))
    sentence = _REPEATED.sub(r"\1", sentence)
    for cut in cuts:
        sentence = re.sub(cut, "", sentence, flags=re.IGNORECASE)
    return " ".join(sentence.split()).strip(" .,")
