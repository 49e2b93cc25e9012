"""Captions that do not name what is learned: what the base model's answers are kept for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lora_trainer.dataset.captions import Caption, Span, contains_word, train_text, without_word

WORDS = (
    "apple", "baby", "bag", "ball", "bear", "bicycle", "bird", "boat", "book", "bottle", "bowl", "boy", "bridge", "bus",
    "cake", "car", "castle", "cat", "chair", "church", "city", "clock", "cow", "cup", "dog", "door", "dress", "fish",
    "flower", "forest", "girl", "hat", "horse", "house", "lamp", "man", "mountain", "person", "plane", "robot", "ship",
    "shoe", "soldier", "statue", "table", "tower", "train", "tree", "truck", "vase", "window", "woman",
)  # fmt: skip
"""What stands in the place of what is learned where nobody says: ordinary things, which a base model knows."""
MOST = 64
"""So many different captions are enough, and take little time and room to encode."""


def unnamed(caption: Caption, trigger_word: str = "", instead: str = "", weighted: bool = False) -> str:
    """The training text without the core (the **bold** parts) and the trigger word; ``instead`` takes their place.

    Empty where the caption has neither of them: then it is not known which of its words name what is learned.
    weighted: see ``train_text``.
    """
    items = [replace(item, spans=tuple(_plain(span, instead) for span in item.spans)) for item in caption.items]
    text = train_text(replace(caption, items=tuple(items)), weighted=weighted)
    if trigger_word.strip():
        text = without_word(text, trigger_word, instead)
    return text if _names(caption, trigger_word) else ""


def _names(caption: Caption, trigger_word: str) -> bool:
    """Whether it is known which of its words name what is learned: ``train_text`` puts the trigger word into each."""
    return bool(trigger_word.strip()) or any(item.is_core for item in caption.items)


def _plain(span: Span, instead: str) -> Span:
    return Span(instead, mood=span.mood) if span.core and span.text.strip() else span


def unnamed_captions(
    captions: Sequence[Caption], trigger_word: str, seed: int, words: Sequence[str] = ()
) -> list[str]:
    """The captions without what is learned, some as they are and more with another thing in its place, one of ``words``
    or else of ``WORDS``: at most ``MOST`` different ones, and the empty one."""
    rng = random.Random(f"{seed}:unnamed")
    texts = sorted({unnamed(caption, trigger_word) for caption in captions} - {""})
    found = dict.fromkeys(rng.sample(texts, min(len(texts), MOST // 4)))
    for _ in range(MOST if texts else 0):
        found[unnamed(rng.choice(captions), trigger_word, rng.choice(words or WORDS))] = None
    return ["", *(text for text in found if text)][: MOST + 1]


def other_captions(
    captions: Sequence[Caption],
    trigger_word: str,
    seed: int,
    words: Sequence[str],
    count: int,
    weighted: bool = False,
) -> list[str]:
    """``count`` captions, each with another thing in the place of what is learned: ``words``, or else ``WORDS``, one
    after the other. The same one comes again where there are no more. They are empty where no caption says what is
    learned. weighted: see ``train_text``.
    """
    rng = random.Random(f"{seed}:others")
    known = [caption for caption in captions if _names(caption, trigger_word)]
    if not known:
        return [""] * count
    words = list(words) or rng.sample(WORDS, len(WORDS))
    found: list[str] = []
    while len(found) < count:
        for caption in rng.sample(known, len(known)):
            word = words[len(found) % len(words)]
            text = unnamed(caption, trigger_word, word, weighted)
            # As the trigger word, it is put first where the caption has no place for it.
            found.append(text if contains_word(text, word) else ", ".join(filter(None, (word, text))))
    return found[:count]
