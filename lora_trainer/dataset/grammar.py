r"""The grammar of structured captions: what a caption means, and how it is written.

    caption := item (separator item)*   separators: , ， 、 and newline
    item    := span+
    span    := text | "**"text"**" | "*"text"*" | "***"text"***"
    escape  := "\" + one of * , \ ( ) [ ] { } | :

Bold is the core of the picture, italics its mood, ``***x***`` both. A run of stars switches the emphasis: one star
the mood, two the core, three both; so ``**a***b*`` is a core ``a`` beside a mood ``b``, and every sequence of spans
can be written. A run of four or more, a run that nothing closes before its item ends, and a single star before
white space that would open, are text. Balanced brackets keep separators inside an item. ``|||`` (at most twice)
splits a caption into kept, free and kept parts as kohya's scripts do.

A span keeps its text as it was written, escapes and all, so nothing a person typed is lost:
``format(parse(text))`` changes separators and outer white space and nothing else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

SEPARATORS = ",，、\n\r"
ESCAPABLE = "*,\\()[]{}|:"
_OPENERS = {"(": ")", "[": "]", "{": "}"}
_CLOSERS = {close: opening for opening, close in _OPENERS.items()}

# An emoticon's bracket opens nothing: ":( , :)" are two faces and not one bracket around a comma. Only where white
# space, a separator, a mark or the end stands on both sides.
_EDGE = r"\s,，、*|"
_EMOTICON = re.compile(rf"(?<![^{_EDGE}])(?:>?[:;=]['^o-]?[()\[\]{{}}]|[()\[\]]['^o-]?[:;=]<?)(?![^{_EDGE}])")

_SYNTAX = re.compile(r"[\\()\[\]{}|*]")
_SEPARATOR = re.compile(f"[{SEPARATORS}]")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
NETWORK_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
KEYWORD = re.compile(r"(?<!\w)(?:AND|BREAK)(?!\w)")
PROMPT_EDITING = re.compile(r"(?<!\\)\[(?:[^\[\]]*:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*|[^\[\]|]*\|[^\[\]]*)\]")

PLAIN, BACKSLASH, ESCAPED = 0, 1, 2  # what a character is: itself, the "\" of an escape, the escaped one


@dataclass(frozen=True)
class Span:
    """A stretch of one emphasis. ``text`` is as written, without the marks, with the escapes."""

    text: str
    core: bool = False
    mood: bool = False


@dataclass(frozen=True)
class Item:
    """What stands between two separators. Made by ``parse`` or ``make_item``."""

    spans: tuple[Span, ...]

    @property
    def is_core(self) -> bool:
        return any(span.core and span.text.strip() for span in self.spans)

    @property
    def is_mood(self) -> bool:
        return any(span.mood and span.text.strip() for span in self.spans)

    @property
    def source(self) -> str:
        """The item as it is written in a caption, marks and escapes included."""
        pieces: list[str] = []
        core = mood = False
        for span in self.spans:
            pieces += ["*" * (2 * (core != span.core) + (mood != span.mood)), span.text]
            core, mood = span.core, span.mood
        pieces.append("*" * (2 * core + mood))
        return "".join(pieces)


@dataclass(frozen=True)
class Caption:
    """A parsed caption; made by ``parse`` or ``compose``, for both of which ``parse(format(x)) == x``.

    ``keep`` holds the places of ``|||`` as indices into ``items``: none, one (the kept part ends there) or two (the
    free part ends at the second). ``warnings`` and ``wildcards`` do not count when captions are compared.
    """

    items: tuple[Item, ...] = ()
    keep: tuple[int, ...] = ()
    wildcards: bool = field(default=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)


def parse(text: str, wildcards: bool = False) -> Caption:
    """Read a caption. Any text is a caption: what looks wrong is taken literally and reported in ``warnings``.

    ``wildcards`` makes ``{a|b}`` a choice that the training text draws from, instead of plain text.
    """
    warnings: list[str] = []
    keep: list[int] = []
    if _SYNTAX.search(text):
        items = _split(text, keep, warnings)
    else:  # most captions, a good deal quicker
        items = [_plain_item(piece) for part in _SEPARATOR.split(text) if (piece := part.strip())]
    _warn_of_prompt_syntax(text, warnings)
    return Caption(tuple(items), tuple(keep), wildcards, tuple(dict.fromkeys(warnings)))


@lru_cache(maxsize=4096)
def _plain_item(text: str) -> Item:
    """The item of a text without any syntax. The tags of a data set are few."""
    return Item((Span(text),))


def _split(text: str, keep: list[int], warnings: list[str]) -> list[Item]:
    """The items of a caption; the places of ``|||`` are added to ``keep``."""
    kinds = character_kinds(text)
    shielded = _shielded(text, kinds)
    items: list[Item] = []

    def finish(end: int) -> None:
        if piece := text[start:end].strip():
            items.append(_parse_item(piece, warnings))

    start = position = 0
    while position < len(text):
        width = 1
        if kinds[position] == PLAIN and not shielded[position]:
            if text[position] in SEPARATORS:
                finish(position)
                start = position + 1
            elif text[position] == "|":
                width = _run_length(text, kinds, position, "|")
                if width == 3 and len(keep) < 2:
                    finish(position)
                    keep.append(len(items))
                    start = position + 3
                elif width == 3:
                    warnings.append("'|||' can stand twice in a caption; the third is taken as text.")
        position += width
    finish(len(text))
    return items


def format(caption: Caption) -> str:
    """Write a caption, marks and escapes included, in one line unless a bracket holds a newline."""
    bounds = [0, *caption.keep, len(caption.items)]
    parts = (", ".join(item.source for item in caption.items[start:end]) for start, end in itertools.pairwise(bounds))
    return " ||| ".join(parts).strip()


def escape(text: str) -> str:
    r"""Plain text as one span's source, so that no character of it has a meaning: ``a (b)*`` → ``a \(b\)\*``.

    The separators that have no escape (， 、 newline) become commas.
    """
    pieces = []
    for index, character in enumerate(text):
        following = text[index + 1 : index + 2]
        if character == "\\":
            pieces.append("\\\\" if not following.strip() or following in ESCAPABLE + SEPARATORS else "\\")
        elif character in SEPARATORS:
            pieces.append("\\,")
        elif character in "*()[]{}" or (character == "|" and following == "|"):
            pieces.append("\\" + character)
        else:
            pieces.append(character)
    return "".join(pieces)


def make_item(*pieces: str | tuple[str, bool, bool], core: bool = False, mood: bool = False) -> Item:
    """An item from plain texts, escaped as needed: ``make_item("star", core=True)``, or several pieces of
    ``(text, core, mood)``. White space at an emphasis' start is put before it, where it can be written."""
    spans: list[Span] = []
    for piece in pieces:
        text, is_core, is_mood = (piece, core, mood) if isinstance(piece, str) else piece
        bare = text.lstrip()
        if is_core or is_mood:
            _append(spans, Span(escape(text[: len(text) - len(bare)])))
            text = bare
        _append(spans, Span(escape(text), is_core, is_mood))
    return _parse_item(Item(tuple(spans)).source.strip(), [])


def compose(items: Iterable[Item], keep: Sequence[int] = (), wildcards: bool = False) -> Caption:
    """A caption from items, in any order. Brackets that would pair across items are escaped."""
    caption = Caption(tuple(item for item in items if item.spans), tuple(keep), wildcards)
    again = parse(format(caption), wildcards)
    if again != caption:
        loose = tuple(_parse_item(_escape_loose(item.source), []) for item in caption.items)
        again = parse(format(Caption(loose, caption.keep)), wildcards)
    return again


def character_kinds(text: str) -> bytearray:
    """For each character PLAIN, BACKSLASH or ESCAPED. A backslash before any other character is itself."""
    kinds = bytearray(len(text))
    position = text.find("\\")
    while 0 <= position < len(text) - 1:
        if text[position + 1] in ESCAPABLE:
            kinds[position], kinds[position + 1] = BACKSLASH, ESCAPED
            position += 1
        position = text.find("\\", position + 1)
    return kinds


def bracket_pairs(text: str, kinds: bytearray) -> dict[int, int]:
    """Index of each opening bracket that is closed → index of its closing one. Escaped ones and faces do not count;
    an opening bracket inside a pair of another kind that nothing closes is text."""
    faces = {index for match in _EMOTICON.finditer(text) for index in range(*match.span())}
    pairs: dict[int, int] = {}
    stack: list[int] = []
    waiting = dict.fromkeys(_OPENERS, 0)
    for index, character in enumerate(text):
        if kinds[index] != PLAIN or index in faces:
            continue
        if character in _OPENERS:
            stack.append(index)
            waiting[character] += 1
        elif (opening := _CLOSERS.get(character)) and waiting[opening]:
            while True:
                candidate = stack.pop()
                waiting[text[candidate]] -= 1
                if text[candidate] == opening:
                    pairs[candidate] = index
                    break
    return pairs


def _shielded(text: str, kinds: bytearray) -> bytearray:
    shielded = bytearray(len(text))
    end = -1
    for opening, closing in sorted(bracket_pairs(text, kinds).items()):
        if opening > end:  # pairs nest, so the outermost ones cover the others
            end = closing
            shielded[opening : closing + 1] = b"\x01" * (closing + 1 - opening)
    return shielded


def _run_length(text: str, kinds: bytearray, start: int, character: str) -> int:
    end = start
    while end < len(text) and text[end] == character and kinds[end] == PLAIN:
        end += 1
    return end - start


def _star_runs(text: str, kinds: bytearray) -> list[tuple[int, int]]:
    runs = []
    position = text.find("*")
    while position >= 0:
        width = _run_length(text, kinds, position, "*")
        if width:
            runs.append((position, width))
        position = text.find("*", position + max(width, 1))
    return runs


def _parse_item(text: str, warnings: list[str]) -> Item:
    kinds = character_kinds(text)
    if text.endswith("\\") and kinds[-1] == PLAIN:
        text += "\\"  # else it would escape the comma that follows when the caption is written again
        kinds = character_kinds(text)
    runs = _star_runs(text, kinds)
    marks: list[tuple[int, int]] = []
    for start, width in runs:
        if width > 3:
            warnings.append(f"{text!r}: four or more stars in a row are taken as text.")
        else:
            marks.append((start, width))
    marks = _closed_marks(text, marks, warnings)

    spans: list[Span] = []
    core = mood = False
    position = 0
    for start, width in [*marks, (len(text), 0)]:
        _append(spans, Span(text[position:start], core, mood))
        core, mood = core != (width >= 2), mood != (width % 2 == 1)
        position = start + width
    for span in spans:
        if (span.core or span.mood) and not any(character.isalnum() for character in span.text):
            warnings.append(
                rf"{text!r}: the emphasis {span.text!r} has no letters. Write \* for a star that is meant as a star."
                if span.text.strip()
                else rf"{text!r}: an emphasis is empty. Write \* for a star that is meant as a star."
            )
    return Item(tuple(spans))


def _closed_marks(text: str, marks: list[tuple[int, int]], warnings: list[str]) -> list[tuple[int, int]]:
    """The runs that are marks. The last opener that stays open is taken as text, and so on until all are closed."""
    while True:
        core_opener = mood_opener = None
        used: list[tuple[int, int]] = []
        for mark in marks:
            start, width = mark
            following = text[start + 1 : start + 2]
            if width == 1 and mood_opener is None and not following.strip():
                continue  # "5 * 3": a star before white space opens nothing
            used.append(mark)
            if width >= 2:
                core_opener = mark if core_opener is None else None
            if width % 2:
                mood_opener = mark if mood_opener is None else None
        unclosed = [mark for mark in (core_opener, mood_opener) if mark is not None]
        if not unclosed:
            return used
        last = max(unclosed)
        warnings.append(f"{text!r}: {'*' * last[1]!r} is never closed before the item ends and is taken as text.")
        marks = [mark for mark in marks if mark != last]


def _append(spans: list[Span], span: Span) -> None:
    if not span.text:
        return
    if spans and (spans[-1].core, spans[-1].mood) == (span.core, span.mood):
        spans[-1] = Span(spans[-1].text + span.text, span.core, span.mood)
    else:
        spans.append(span)


def _escape_loose(source: str) -> str:
    """Escape the brackets of an item that have no partner in it, and its ``|||``."""
    kinds = character_kinds(source)
    pairs = bracket_pairs(source, kinds)
    partners = set(pairs) | set(pairs.values())
    return "".join(
        "\\" + character
        if kinds[index] == PLAIN and (character == "|" or (character in "()[]{}" and index not in partners))
        else character
        for index, character in enumerate(source)
    )


def _warn_of_prompt_syntax(text: str, warnings: list[str]) -> None:
    for word in dict.fromkeys(KEYWORD.findall(text)):
        warnings.append(f"{word} means something in a WebUI prompt; in a caption it does not.")
    for tag in dict.fromkeys(NETWORK_TAG.findall(text)):
        warnings.append(f"{tag} loads a network in a WebUI prompt; it is left out of the training text.")
    if editing := PROMPT_EDITING.search(text):
        warnings.append(f"{editing.group()} is prompt editing in the WebUI; in a caption it stays as it is written.")
    if _CHINESE.search(text):
        warnings.append(
            "Stable Diffusion's CLIP barely reads Chinese: give a mapping file (中文: english) or write the caption "
            "in English."
        )
