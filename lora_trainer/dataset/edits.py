r"""Changes to captions as pure functions: text in, text out, with marks, weights and escapes of what stays.

A tag is named by its plain text, in any case: ``red hat`` finds ``**red hat**`` and ``(Red Hat:1.2)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lora_trainer.dataset.captions import Caption, Item, compose, format, parse, plain_text
from lora_trainer.dataset.grammar import Span
from lora_trainer.errors import UserError, has_half_characters
from lora_trainer.patterns import Pattern

EditKind = Literal["set", "add", "remove", "replace", "move", "mark", "regex"]
KINDS: tuple[EditKind, ...] = ("set", "add", "remove", "replace", "move", "mark", "regex")
MARKS = ("core", "mood", "both", "none")
PLACES = ("start", "end")

_MAX_PATTERN = 500
MAX_CAPTION = 20_000
"""Characters of a caption. Of it 225 tokens are read at most; longer ones take long to look at."""


@dataclass(frozen=True)
class Edit:
    r"""One change of captions.

    set: the caption becomes ``value``. add: the items of ``value`` that it lacks, at ``place``. remove: ``tags``.
    replace: each of ``tags`` becomes ``value`` (once, if several stand there). move: ``tags`` to ``place``.
    mark: ``tags`` become ``value``: core, mood, both or none.
    regex: ``pattern`` becomes ``value`` in the caption as it is written (``\1`` and ``\g<name>`` stand for groups).
    """

    kind: EditKind
    value: str = ""
    tags: tuple[str, ...] = ()
    place: str = "end"
    pattern: str = ""
    ignore_case: bool = False

    def function(self) -> Callable[[str], str]:
        """The change as a function of a caption's text. Raises UserError when it cannot be done to any caption."""
        if self.kind not in KINDS:
            raise UserError(f"There is no edit {self.kind!r}.", field="kind", remedy=f"One of {', '.join(KINDS)}.")
        if self.kind in ("add", "move") and self.place not in PLACES:
            raise UserError(f"{self.place!r} is no place.", field="place", remedy="Use start or end.")
        if self.kind in ("remove", "replace", "move", "mark") and not any(tag.strip() for tag in self.tags):
            raise UserError("No tag is named.", field="tags", remedy="Name at least one tag.")
        if self.kind == "mark" and self.value not in MARKS:
            raise UserError(f"{self.value!r} is no mark.", field="value", remedy=f"One of {', '.join(MARKS)}.")
        if self.kind in ("add", "replace") and not self.value.strip():
            raise UserError("There is no text to write.", field="value", remedy="Use remove to take a tag out.")
        if len(self.value) > MAX_CAPTION or sum(map(len, self.tags)) > MAX_CAPTION:
            raise UserError(f"It has more than {MAX_CAPTION} characters.", field="value", remedy="Shorten it.")
        change = getattr(self, f"_{self.kind}")()

        def checked(text: str) -> str:
            result = change(text)
            if result != text:
                check_caption(result)
            return result

        return checked

    def _set(self) -> Callable[[str], str]:
        return lambda text: self.value

    def _add(self) -> Callable[[str], str]:
        return lambda text: add_items(text, self.value, self.place)

    def _remove(self) -> Callable[[str], str]:
        return lambda text: replace_tags(text, self.tags, "")

    def _replace(self) -> Callable[[str], str]:
        return lambda text: replace_tags(text, self.tags, self.value)

    def _move(self) -> Callable[[str], str]:
        return lambda text: move_tags(text, self.tags, self.place)

    def _mark(self) -> Callable[[str], str]:
        core, mood = self.value in ("core", "both"), self.value in ("mood", "both")
        return lambda text: mark_tags(text, self.tags, core=core, mood=mood)

    def _regex(self) -> Callable[[str], str]:
        pattern = compile_pattern(self.pattern, ignore_case=self.ignore_case)
        pattern.sub(self.value, "")
        return lambda text: pattern.sub(self.value, text, MAX_CAPTION)


def add_items(text: str, addition: str, place: str = "end") -> str:
    """The items of ``addition`` that ``text`` lacks, put at its start or end; the rest of ``text`` stays as it is."""
    known = {identity(plain_text(item)) for item in parse(text).items}
    fresh = [item.source for item in parse(addition).items if identity(plain_text(item)) not in known]
    if not fresh:
        return text
    if not text.strip():
        return ", ".join(fresh)
    return ", ".join([text.rstrip(" ,"), *fresh] if place == "end" else [*fresh, text.lstrip(" ,")])


def replace_tags(text: str, tags: Iterable[str], value: str) -> str:
    """The caption with ``value`` instead of each of ``tags``, or without them where it is empty. A new tag that is
    there already is not written twice; it keeps the marks of the one that it replaces unless it brings its own."""
    caption, wanted = parse(text), _identities(tags)
    new = parse(value).items
    there = {identity(plain_text(item)) for item in caption.items} - wanted
    items: list[Item] = []
    keep = list(caption.keep)
    for index, item in enumerate(caption.items):
        boundaries = [place for place, old in enumerate(caption.keep) if old == index]
        for place in boundaries:
            keep[place] = len(items)
        if identity(plain_text(item)) not in wanted:
            items.append(item)
            continue
        for one in new:
            name = identity(plain_text(one))
            if name not in there:
                there.add(name)
                marked = one.is_core or one.is_mood
                items.append(one if marked else _marked(one, core=item.is_core, mood=item.is_mood))
    keep = [len(items) if old >= len(caption.items) else place for place, old in zip(keep, caption.keep)]
    return _written(text, caption, items, keep)


def move_tags(text: str, tags: Iterable[str], place: str) -> str:
    """The caption with ``tags`` at its start or end, in the order in which they stood."""
    caption, wanted = parse(text), _identities(tags)
    moved = [item for item in caption.items if identity(plain_text(item)) in wanted]
    rest = [item for item in caption.items if identity(plain_text(item)) not in wanted]
    keep = []
    for boundary in caption.keep:
        before = caption.items[:boundary]
        staying = sum(identity(plain_text(item)) not in wanted for item in before)
        keep.append(staying + len(moved) if place == "start" else staying)
    return _written(text, caption, [*moved, *rest] if place == "start" else [*rest, *moved], keep)


def mark_tags(text: str, tags: Iterable[str], *, core: bool, mood: bool) -> str:
    """The caption with ``tags`` as core, as mood, both, or neither; a tag is marked as a whole."""
    caption, wanted = parse(text), _identities(tags)
    items = [
        _marked(item, core=core, mood=mood) if identity(plain_text(item)) in wanted else item for item in caption.items
    ]
    return _written(text, caption, items, caption.keep)


def compile_pattern(pattern: str, *, ignore_case: bool = False) -> Pattern:
    """A regular expression that a person typed.

    Raises:
        UserError: it is no expression, too long, or repeats a repetition, such as ``(a+)+``, which searches for hours.
    """
    if not pattern or len(pattern) > _MAX_PATTERN:
        remedy = f"Write one of up to {_MAX_PATTERN} characters."
        raise UserError("There is no pattern, or it is too long.", field="pattern", remedy=remedy)
    compiled = Pattern(pattern, ignore_case=ignore_case, field="pattern")
    if _repeats_a_repetition(pattern):
        raise UserError(
            "The pattern repeats something that repeats itself, such as (a+)+, and could search for hours.",
            field="pattern",
            remedy="Write it without a repetition inside a repetition.",
        )
    return compiled


def check_caption(text: str) -> None:
    """Raises UserError for a text that no caption can be."""
    if len(text) > MAX_CAPTION:
        raise UserError(f"A caption would have more than {MAX_CAPTION} characters.", field="value",
                        remedy="Shorten it; 225 tokens are read at most.")  # fmt: skip
    if "\0" in text or has_half_characters(text):
        raise UserError("A caption would hold characters that no file takes.", field="value",
                        remedy="Send valid Unicode.")  # fmt: skip


def identity(text: str) -> str:
    """What two spellings of a tag share: without case and surplus white space."""
    return " ".join(text.casefold().split())


def _identities(tags: Iterable[str]) -> set[str]:
    return {identity(tag) for tag in tags if tag.strip()}


def _marked(item: Item, *, core: bool, mood: bool) -> Item:
    text = "".join(span.text for span in item.spans)
    if not any(character.isalnum() for character in text):
        return item  # an emphasis without letters would be taken as stars
    return replace(item, spans=(Span(text.strip(), core, mood),))


def _written(text: str, caption: Caption, items: list[Item], keep: Iterable[int]) -> str:
    """The new text; the old one, white space and all, when nothing changed."""
    if tuple(items) == caption.items and tuple(keep) == caption.keep:
        return text
    return format(compose(items, tuple(keep)))


_NESTED = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<open>\()|(?P<close>\))|(?P<repeat>[*+]|\{\d*,\d*\})", re.DOTALL
)


def _repeats_a_repetition(pattern: str) -> bool:
    """Whether a group that holds an open-ended repetition is itself repeated."""
    stack = [False]  # for each open group: whether something in it repeats
    closed = False  # whether a group that repeats something ended right here
    end = -1
    for match in _NESTED.finditer(pattern):
        after_group = closed and match.start() == end
        closed = False
        if match["open"]:
            stack.append(False)
        elif match["close"] and len(stack) > 1:
            closed = stack.pop()
            end = match.end()
            stack[-1] |= closed
        elif match["repeat"]:
            if after_group:
                return True
            stack[-1] = True
    return False
