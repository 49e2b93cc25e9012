r"""Structured captions: what the tokenizer reads, and what the WebUI's prompt reads.

The grammar is in ``grammar.py``; this module renders a parsed caption. The plain text of an item has no marks, no
escapes, no weights and no emphasis brackets: what is left is what a person would leave. Brackets are emphasis when
they carry a weight ``(tag:1.2)``, are doubled ``((tag))``, or hold a whole item ``(tag)``, ``[tag]``; others, such as
``miku (vocaloid)``, are part of the name. Weights and emphasis follow the WebUI's ``prompt_parser.py``.
"""

from __future__ import annotations

import enum
import itertools
import random
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

from lora_trainer.dataset.grammar import (
    BACKSLASH,
    NETWORK_TAG,
    PLAIN,
    PROMPT_EDITING,
    SEPARATORS,
    Caption,
    Item,
    Span,
    bracket_pairs,
    character_kinds,
    compose,
    escape,
    format,
    make_item,
    parse,
)
from lora_trainer.dataset.translation import load_mapping, translate

__all__ = [
    "Caption", "Item", "Span", "compose", "contains_word", "core_items", "core_texts", "escape", "format",
    "has_choices", "load_mapping", "make_item", "mentions", "mood_items", "one_of", "parse", "plain_text",
    "plain_texts", "prompt_text", "train_text", "translate",
]  # fmt: skip

_WEIGHT = re.compile(r":\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*$")
_SPECIAL = re.compile(r"[()\[\]{}\\<,，、\r\n]|BREAK")
_BREAK = re.compile(r"(?<!\w)BREAK(?!\w)")
_CHOICE = re.compile(r"(?<!\\)\{([^{}|]*\|[^{}]*)(?<!\\)\}")
# A face such as (^_^) has no word in it; emphasis does.
_WORD = re.compile("[^\\W\\d_]{2,}|\\d{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")


def one_of(text: str, wildcards: bool, rng: random.Random | None) -> Caption:
    """The caption of a visit. With ``wildcards`` one of its lines, as ``rng`` draws (the first without it), whose
    ``{a|b}`` are choices."""
    lines = [line for line in text.splitlines() if line.strip()] if wildcards else []
    if len(lines) > 1:
        text = rng.choice(lines) if rng is not None else lines[0]
    return parse(text, wildcards)


def has_choices(text: str) -> bool:
    """Whether a caption has several lines, or ``{a|b}``: what ``wildcards`` makes a choice of."""
    return len([line for line in text.splitlines() if line.strip()]) > 1 or _CHOICE.search(text) is not None


def train_text(
    caption: Caption,
    *,
    trigger_word: str = "",
    keep_tokens: int = 0,
    shuffle: bool = False,
    tag_dropout: float = 0.0,
    rng: random.Random | None = None,
    weighted: bool = False,
) -> str:
    """The text that the tokenizer reads in training: no marks, no escapes, NFC, items joined with ``", "``.

    The kept items stand first, in their order, and are neither shuffled nor dropped: those before ``|||`` (and after
    a second one, at the end), or without it the first ``keep_tokens`` and all core items. ``trigger_word`` is put
    first when the caption lacks it. Items are dropped with probability ``tag_dropout``, mood items with twice that;
    the trigger word never. Without ``rng`` nothing is shuffled or dropped and a wildcard takes its first choice.
    With ``weighted`` the text is in the WebUI's prompt syntax: weights stay, literal brackets are escaped.
    """
    if caption.wildcards:
        caption = _choose(caption, rng)
    trigger_word = trigger_word.strip()
    mode = _Mode.WEIGHTED if weighted else _Mode.PLAIN
    moves = bool(trigger_word) and (shuffle or tag_dropout > 0)
    tokens: list[_Token] = []
    boundaries: list[int] = []
    for index, item in enumerate(caption.items):
        boundaries += [len(tokens)] * caption.keep.count(index)
        if text := _render(item, mode):
            plain = text if mode is _Mode.PLAIN else plain_text(item)
            is_trigger = moves and contains_word(plain, trigger_word)
            tokens.append(_Token(text, plain, item.is_core, item.is_mood, is_trigger))
    boundaries += [len(tokens)] * (len(caption.keep) - len(boundaries))

    if boundaries:
        kept = tokens[: boundaries[0]]
        free = tokens[boundaries[0] : boundaries[1] if len(boundaries) > 1 else None]
        last = tokens[boundaries[1] :] if len(boundaries) > 1 else []
    else:
        stays = [
            index < keep_tokens or token.core or (shuffle and token.is_trigger) for index, token in enumerate(tokens)
        ]
        kept = [token for token, stay in zip(tokens, stays) if stay]
        free = [token for token, stay in zip(tokens, stays) if not stay]
        last = []
    if rng is not None and tag_dropout > 0:
        free = [t for t in free if t.is_trigger or rng.random() >= tag_dropout * (2 if t.mood else 1)]
    if rng is not None and shuffle:
        rng.shuffle(free)

    texts = [token.text for token in (*kept, *free, *last)]
    if trigger_word and not contains_word(", ".join(token.plain for token in tokens), trigger_word):
        texts.insert(0, escape_brackets(trigger_word) if weighted else trigger_word)
    return unicodedata.normalize("NFC", ", ".join(texts))


def has_weights(caption: Caption) -> bool:
    """Whether it holds the WebUI's weights or emphasis brackets, which ``weighted`` keeps."""
    return any(
        re.sub(r"\\([()\[\]\\])", r"\1", _render(item, _Mode.WEIGHTED)) != _render(item, _Mode.PLAIN)
        for item in caption.items
    )


def prompt_text(caption: Caption) -> str:
    """The caption as a WebUI prompt: marks removed, weights kept, literal brackets and backslashes escaped, in the
    order in which it was written."""
    return ", ".join(text for item in caption.items if (text := _render(item, _Mode.PROMPT)))


def plain_text(item: Item) -> str:
    """One item as the tokenizer reads it (NFC); wildcards as they are written."""
    return unicodedata.normalize("NFC", _render(item, _Mode.PLAIN))


def plain_texts(caption: Caption) -> list[str]:
    """The plain text of each item that has any, in order."""
    return [text for item in caption.items if (text := plain_text(item))]


def core_items(caption: Caption) -> tuple[Item, ...]:
    return tuple(item for item in caption.items if item.is_core)


def mood_items(caption: Caption) -> tuple[Item, ...]:
    return tuple(item for item in caption.items if item.is_mood)


def core_texts(caption: Caption) -> tuple[str, ...]:
    """The bold parts alone, in order, each once: ``a red **star** on navy`` → ``("star",)``."""
    texts = []
    for item in core_items(caption):
        for is_core, group in itertools.groupby(_letters(item), attrgetter("core")):
            if is_core:
                texts.append(unicodedata.normalize("NFC", _join(group, _Mode.PLAIN)))
    return tuple(dict.fromkeys(text for text in texts if text))


def mentions(caption: Caption, word: str) -> bool:
    """Whether ``word`` stands in the plain text, as whole words and in any case."""
    return contains_word(", ".join(plain_texts(caption)), word)


def contains_word(text: str, word: str) -> bool:
    """Whether ``word`` stands in a plain text, as whole words and in any case; no word is in no text."""
    pattern = _whole_words(word)
    return pattern is not None and pattern.search(_folded(text)) is not None


def without_word(text: str, word: str, instead: str = "") -> str:
    """``text`` with ``instead`` in the place of ``word``, as whole words and in any case, and without the commas around
    nothing."""
    pattern = _whole_words(word)
    if pattern is not None:
        text = re.sub(pattern.pattern, lambda _: instead, unicodedata.normalize("NFC", text), flags=re.IGNORECASE)
    return ", ".join(part for piece in text.split(",") if (part := " ".join(piece.split())).strip("*() "))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@lru_cache(maxsize=64)
def _whole_words(word: str) -> re.Pattern[str] | None:
    """A regular expression for ``word`` in a text in lower case; None for no word."""
    word = _folded(word)
    if not word:
        return None
    # Chinese has no spaces between words, so only a Latin edge must be a word's edge.
    before = r"(?<![a-z0-9_])" if re.match(r"[a-z0-9_]", word) else ""
    after = r"(?![a-z0-9_])" if re.search(r"[a-z0-9_]$", word) else ""
    return re.compile(before + re.escape(word) + after)


def escape_brackets(text: str) -> str:
    r"""Plain text in the WebUI's prompt syntax: ``( ) [ ] \`` get a backslash."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


@dataclass(frozen=True)
class _Token:
    text: str
    plain: str
    core: bool
    mood: bool
    is_trigger: bool


class _Mode(enum.Enum):
    PLAIN = "no syntax at all"
    WEIGHTED = "the WebUI's weights and nothing else of its syntax"
    PROMPT = "all of the WebUI's syntax"


class _Role(enum.Enum):
    TEXT = "stands for itself"
    SYNTAX = "a weight or a bracket that is emphasis"
    EDITING = "prompt editing, kept as it is written"
    NETWORK = "<lora:…>"
    BREAK = "the word BREAK, which parts two chunks"
    SEPARATOR = "a separator inside brackets"


@dataclass(frozen=True)
class _Letter:
    """A character of an item's text; the backslashes of escapes are left out."""

    character: str
    role: _Role
    core: bool


def _choose(caption: Caption, rng: random.Random | None) -> Caption:
    """Replace every ``{a|b}`` by one of its parts, the innermost first."""

    def pick(match: re.Match[str]) -> str:
        options = match.group(1).split("|")
        return options[0] if rng is None else rng.choice(options)

    text, replaced = _CHOICE.subn(pick, format(caption))
    while replaced:  # every round removes braces, so this ends
        text, replaced = _CHOICE.subn(pick, text)
    return parse(text)


def _render(item: Item, mode: _Mode) -> str:
    if len(item.spans) == 1 and not _SPECIAL.search(item.spans[0].text):
        return " ".join(item.spans[0].text.split())  # most tags, a good deal quicker
    return _join(_letters(item), mode)


def _join(letters: Iterable[_Letter], mode: _Mode) -> str:
    pieces = [""]
    for letter in letters:
        if letter.role is _Role.SEPARATOR or (letter.role is _Role.BREAK and mode is not _Mode.PROMPT):
            pieces.append("")
        elif letter.role is _Role.TEXT:
            pieces[-1] += letter.character if mode is _Mode.PLAIN else escape_brackets(letter.character)
        elif (
            mode is _Mode.PROMPT
            or letter.role is _Role.EDITING
            or (letter.role is _Role.SYNTAX and mode is _Mode.WEIGHTED)
        ):
            pieces[-1] += letter.character
    return ", ".join(" ".join(piece.split()) for piece in pieces if piece.strip())


def _letters(item: Item) -> list[_Letter]:
    text = "".join(span.text for span in item.spans)
    core = [span.core for span in item.spans for _ in span.text]
    kinds = character_kinds(text)
    roles = [
        _Role.SEPARATOR if character in SEPARATORS and kinds[index] == PLAIN else _Role.TEXT
        for index, character in enumerate(text)
    ]
    for index in _syntax(text, kinds):
        roles[index] = _Role.SYNTAX
    for pattern, role in ((PROMPT_EDITING, _Role.EDITING), (NETWORK_TAG, _Role.NETWORK), (_BREAK, _Role.BREAK)):
        for match in pattern.finditer(text):
            roles[match.start() : match.end()] = [role] * (match.end() - match.start())
    return [
        _Letter(character, roles[index], core[index])
        for index, character in enumerate(text)
        if kinds[index] != BACKSLASH
    ]


def _syntax(text: str, kinds: bytearray) -> set[int]:
    """Indices of the weights and emphasis brackets of an item's text."""
    pairs = bracket_pairs(text, kinds)
    found: set[int] = set()
    weights: dict[int, int] = {}  # opening bracket → where its weight starts
    for opening, closing in pairs.items():
        weight = _WEIGHT.search(text, max(opening + 2, closing - 24), closing) if text[opening] == "(" else None
        if weight and kinds[weight.start()] == PLAIN:
            weights[opening] = weight.start()
            found |= {opening, *range(weight.start(), closing + 1)}
        elif text[opening + 1] == text[opening] and pairs.get(opening + 1) == closing - 1:
            found |= {opening, opening + 1, closing - 1, closing}

    start, end = 0, len(text)  # what of the item is inside the brackets around it
    while start < end and pairs.get(start) == end - 1:
        if start in weights:
            start, end = start + 1, weights[start]
        elif _WORD.search(text, start + 1, end - 1) and not (text[start] in "[{" and "|" in text[start:end]):
            found |= {start, end - 1}
            start, end = start + 1, end - 1
        else:
            break
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
    return found
