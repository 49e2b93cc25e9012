"""What may be wrong with the captions of a data set, one by one and together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

from lora_trainer.dataset.captions import Caption, mentions, train_text
from lora_trainer.dataset.findings import Finding, enumerate_some
from lora_trainer.dataset.keys import CAPTION_ENDINGS
from lora_trainer.dataset.listing import Listing
from lora_trainer.dataset.tags import core_gaps, near_synonyms, universal_tags

CHUNK_TOKENS = 75
"""Tokens that CLIP reads at a time, its start and end tokens not counted."""

_SUBJECT_SHARE = 0.5  # a core in half of the captions is the subject of the set
_NO_CAPTION = re.compile(r"(?i)readme|licen[cs]e|copying|credits|notes?\b|references|requirements|prompts?\b|classes")
_CHINESE = "CLIP barely reads Chinese"


def check_captions(
    captions: Mapping[str, Caption], trigger_word: str, count_tokens: Callable[[str], int] | None
) -> Iterator[Finding]:
    """Findings on the captions that pictures have. ``count_tokens`` tells the tokens of a text; without it they are
    estimated, and the message says "about"."""
    lacking = [key for key, caption in captions.items() if trigger_word and not mentions(caption, trigger_word)]
    if lacking and len(lacking) == len(captions):
        yield Finding(
            "", "trigger-missing", "info", f"No caption has the trigger word {trigger_word!r}.",
            "Nothing needs doing: training puts it first in every caption.",
            values=(trigger_word,), files=tuple(lacking),
        )  # fmt: skip
    elif lacking:
        for key in lacking:
            yield Finding(
                key, "trigger-missing", "warning",
                f"The caption lacks the trigger word {trigger_word!r}, others have it.",
                "Add it, or leave it: training puts it first where it is missing.",
                values=(trigger_word,),
            )  # fmt: skip

    same: dict[str, list[str]] = defaultdict(list)
    chinese = []
    for key, caption in captions.items():
        text = train_text(caption)
        if not text:
            yield Finding(key, "empty-caption", "warning", "The caption has no text.", "Describe the picture.")
            continue
        same[text.casefold()].append(key)
        yield from _check_length(key, train_text(caption, trigger_word=trigger_word), count_tokens)
        for warning in caption.warnings:
            if _CHINESE in warning:
                chinese.append(key)
            else:
                yield Finding(key, "caption-syntax", "warning", warning, "Correct the caption, if that is not meant.")
    if chinese:
        yield Finding(
            chinese[0], "chinese", "warning",
            f"{len(chinese)} captions are in Chinese, which Stable Diffusion's CLIP barely reads: "
            f"{enumerate_some(chinese)}.",
            "Give a mapping file (中文: english), or write them in English.",
        )  # fmt: skip
    for keys in same.values():
        if len(keys) > 1:
            many = len(keys) > max(2, len(captions) // 2)
            yield Finding(
                keys[0], "identical-captions", "warning" if many else "info",
                f"{len(keys)} pictures have the same caption: {enumerate_some(keys)}.",
                "Say in each what differs; what no caption names melts into the subject.",
                files=tuple(keys),
            )  # fmt: skip
    yield from _check_together(captions, trigger_word)


def orphans(listing: Listing) -> Iterator[Finding]:
    """Text files beside pictures that belong to none of them."""
    stems = {str(PurePosixPath(key).with_suffix("")).casefold() for key in listing.pictures}
    stems |= {key.casefold() for key in listing.pictures}
    folders = {str(PurePosixPath(key).parent) for key in listing.pictures}
    for key in listing.files:
        path = PurePosixPath(key)
        if (
            path.suffix.casefold() in CAPTION_ENDINGS
            and str(path.parent) in folders
            and str(path.with_suffix("")).casefold() not in stems
            and not _NO_CAPTION.search(path.stem)
        ):
            yield Finding(
                key, "orphan-caption", "warning", "The caption file belongs to no picture.",
                "Rename it to its picture's name, or remove it.",
            )  # fmt: skip


def estimate_tokens(text: str) -> int:
    """About how many tokens CLIP makes of a text: one a word of up to eight letters, one a punctuation mark, and two
    a Chinese character, which it reads byte by byte."""
    total = 0
    for piece in re.findall(r"[A-Za-z]+|\d|[^\W\d_A-Za-z]|[^\w\s]|_", text):
        if piece.isascii():
            total += math.ceil(len(piece) / 8)
        else:
            total += 2
    return total


def _check_length(key: str, text: str, count_tokens: Callable[[str], int] | None) -> Iterator[Finding]:
    tokens = count_tokens(text) if count_tokens else estimate_tokens(text)
    if tokens > CHUNK_TOKENS:
        about = "" if count_tokens else "about "
        yield Finding(
            key, "long-caption", "warning",
            f"The caption has {about}{tokens} tokens; CLIP reads {CHUNK_TOKENS} at a time.",
            "Shorten it, or put what matters first.",
        )  # fmt: skip


def _check_together(captions: Mapping[str, Caption], trigger_word: str) -> Iterator[Finding]:
    for gap in core_gaps(captions):
        yield Finding(
            "", "core-missing", "warning" if gap.share >= _SUBJECT_SHARE else "info",
            f"The core {gap.text!r} stands in {gap.share:.0%} of the captions; it is missing in "
            f"{enumerate_some(gap.missing)}.",
            "If these pictures show it, add it to their captions.",
            values=(gap.text,), files=gap.missing,
        )  # fmt: skip
    for tag in universal_tags(captions, trigger_word):
        yield Finding(
            "", "universal-tag", "info", f"Every caption has {tag!r}.",
            "It melts into what is learned. Mark it **core** if it is the subject, else remove it.",
            values=(tag,),
        )  # fmt: skip
    for pair in near_synonyms(captions):
        yield Finding(
            "", "near-synonyms", "info", f"{pair.seldom!r} looks like another spelling of {pair.often!r}.",
            "Write it one way in all captions, if the same is meant.",
            values=(pair.seldom, pair.often),
        )  # fmt: skip
