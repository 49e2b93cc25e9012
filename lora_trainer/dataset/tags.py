"""What the captions of a data set say together: frequencies, a tag cloud, suggestions, near-synonyms, consistency.

A tag is the plain text of a caption's item; two tags are the same when they differ in case and white space only.
Captions are given as a mapping from a picture's key (posix path relative to the data folder) to its parsed caption.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lora_trainer.dataset.captions import Caption, Item, contains_word, core_texts, plain_text, plain_texts

MIN_CONFIDENCE = 0.7
MIN_SUPPORT = 3
MIN_LIFT = 1.5
"""A tag is suggested when P(b|a) reaches the confidence, a and b stand together in that many pictures, and b is that
much likelier beside a than anywhere (``P(b|a) / P(b) > MIN_LIFT``)."""

CORE_SHARE = 0.95
"""A core that stands in fewer of the pictures than this is missing from the others."""

_MAX_WORDS = 4  # longer tags are sentences; near-synonyms among those are no slips
_MAX_COMPARED = 2000
_SIMILAR_WORDS = 0.85
_MIN_LETTERS = 5


@dataclass(frozen=True)
class Tag:
    """A tag of the data set. ``count``: pictures that have it; ``share``: of all captioned ones; ``weight``: its size
    in a tag cloud, 0 (rarest) to 1 (most frequent) on a logarithmic scale; ``core``/``mood``: marked so somewhere."""

    text: str
    count: int
    share: float
    weight: float
    core: bool
    mood: bool


@dataclass(frozen=True)
class Suggestion:
    """``tag`` is missing in picture ``key``, though ``confidence`` of the pictures with ``because`` have it."""

    key: str
    tag: str
    because: str
    confidence: float
    support: int
    lift: float


@dataclass(frozen=True)
class NearSynonym:
    """Two spellings of what is likely one tag; ``often`` is the one that is used more. ``reason``: "spacing"
    (hyphen, underscore, blank), "plural" or "spelling"."""

    often: str
    seldom: str
    reason: str


@dataclass(frozen=True)
class CoreGap:
    """A core and the pictures (keys) whose captions do not mention it."""

    text: str
    share: float
    missing: tuple[str, ...]


def tag_frequency(captions: Iterable[tuple[str, Caption]], root_name: str = "") -> dict[str, dict[str, int]]:
    """Folder name → tag → number of pictures, the layout of ``ss_tag_frequency``; pictures that lie in the data
    folder itself count under ``root_name``. captions: pairs of a picture's key and its caption."""
    folders: dict[str, _Counted] = defaultdict(_Counted)
    for key, caption in captions:
        folders[key.rpartition("/")[0].rpartition("/")[2] or root_name].add(caption)
    return {folder: {tag.text: tag.count for tag in counted.table()} for folder, counted in folders.items()}


def tag_table(captions: Mapping[str, Caption]) -> list[Tag]:
    """All tags, the most frequent first: the frequency table and the tag cloud."""
    counted = _Counted()
    for caption in captions.values():
        counted.add(caption)
    return counted.table()


class _Counted:
    """The tags of captions that were added one by one."""

    def __init__(self) -> None:
        self._captions = 0
        self._counts: Counter[str] = Counter()
        self._spellings: dict[str, Counter[str]] = defaultdict(Counter)
        self._core: set[str] = set()
        self._mood: set[str] = set()

    def add(self, caption: Caption) -> None:
        self._captions += 1
        seen = set()
        for text, is_core, is_mood in _tags(caption):
            identity = _identity(text)
            seen.add(identity)
            self._spellings[identity][text] += 1
            if is_core:
                self._core.add(identity)
            if is_mood:
                self._mood.add(identity)
        for identity in seen:
            self._counts[identity] += 1

    def table(self) -> list[Tag]:
        counts = self._counts
        most = max(counts.values(), default=1)
        return [
            Tag(
                text=self._spellings[identity].most_common(1)[0][0],
                count=count,
                share=count / self._captions,
                weight=math.log(count) / math.log(most) if most > 1 else 1.0,
                core=identity in self._core,
                mood=identity in self._mood,
            )
            for identity, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        ]


def suggestions(captions: Mapping[str, Caption]) -> list[Suggestion]:
    """Tags that a picture likely lacks, each with its best reason; nothing is applied. Ordered by key."""
    names: dict[str, str] = {}
    tags_of: dict[str, set[str]] = {}
    for key, caption in captions.items():
        tags_of[key] = set()
        for text, _, _ in _tags(caption):
            identity = _identity(text)
            names.setdefault(identity, text)
            tags_of[key].add(identity)
    counts = Counter(tag for tags in tags_of.values() for tag in tags)
    frequent = {tag for tag, count in counts.items() if count >= MIN_SUPPORT}
    together: Counter[tuple[str, str]] = Counter()
    for tags in tags_of.values():
        together.update(itertools.permutations(sorted(tags & frequent), 2))

    rules: dict[str, list[tuple[float, int, float, str]]] = defaultdict(list)
    for (given, tag), support in together.items():
        confidence = support / counts[given]
        lift = confidence * len(captions) / counts[tag]
        if support >= MIN_SUPPORT and confidence >= MIN_CONFIDENCE and lift > MIN_LIFT:
            rules[given].append((confidence, support, lift, tag))

    found = []
    for key, tags in sorted(tags_of.items()):
        best: dict[str, Suggestion] = {}
        for given in sorted(tags & rules.keys()):
            for confidence, support, lift, tag in rules[given]:
                if tag in tags:
                    continue
                candidate = Suggestion(key, names[tag], names[given], confidence, support, lift)
                known = best.get(tag)
                if known is None or (known.confidence, known.support) < (confidence, support):
                    best[tag] = candidate
        found += sorted(best.values(), key=lambda item: (-item.confidence, -item.support, item.tag))
    return found


def near_synonyms(captions: Mapping[str, Caption]) -> list[NearSynonym]:
    """Pairs of tags that differ in blanks, hyphens or underscores, in a plural, or in a letter or two of one word."""
    table = [tag for tag in tag_table(captions) if len(tag.text.split()) <= _MAX_WORDS][:_MAX_COMPARED]
    found: list[NearSynonym] = []
    for reason, reduce in (("spacing", _without_spacing), ("plural", _singular)):
        groups: dict[str, list[str]] = defaultdict(list)
        for tag in table:
            groups[reduce(tag.text)].append(tag.text)
        known = {(pair.often, pair.seldom) for pair in found}
        for often, *others in groups.values():
            found += [NearSynonym(often, other, reason) for other in others if (often, other) not in known]

    # A slip of the pen changes one word: only tags that share all other words are compared.
    holes: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for tag in table:
        words = _words(tag.text)
        for place, word in enumerate(words):
            if len(word) >= _MIN_LETTERS:
                rest = (*words[:place], "", *words[place + 1 :], word[0])
                holes[rest].append((tag.text, word))
    compared = {frozenset((pair.often, pair.seldom)) for pair in found}
    for members in holes.values():
        for (often, word), (seldom, other) in itertools.combinations(members, 2):
            if frozenset((often, seldom)) not in compared and _is_slip(word, other):
                compared.add(frozenset((often, seldom)))
                found.append(NearSynonym(often, seldom, "spelling"))
    return found


def core_gaps(captions: Mapping[str, Caption]) -> list[CoreGap]:
    """Cores that more than one caption marks and fewer than ``CORE_SHARE`` of all captions mention, marked or not;
    the most frequent first. A core that stands once describes its picture and no subject of the set."""
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    for caption in captions.values():
        for text in core_texts(caption):
            names.setdefault(_identity(text), text)
        counts.update({_identity(text) for text in core_texts(caption)})
    texts = {key: ", ".join(plain_texts(caption)).casefold() for key, caption in captions.items()}
    gaps = []
    for identity, count in counts.items():
        if count < 2:
            continue
        missing = tuple(sorted(key for key, text in texts.items() if not contains_word(text, identity)))
        share = 1 - len(missing) / len(captions)
        if share < CORE_SHARE:
            gaps.append(CoreGap(names[identity], share, missing))
    return sorted(gaps, key=lambda gap: (-gap.share, gap.text))


def universal_tags(captions: Mapping[str, Caption], trigger_word: str = "") -> list[str]:
    """Tags on every picture, without core ones and those with the trigger word: what they name melts into the
    subject."""
    if len(captions) < 2:
        return []
    return [
        tag.text
        for tag in tag_table(captions)
        if tag.count == len(captions) and not tag.core and not contains_word(tag.text, trigger_word)
    ]


def _tags(caption: Caption) -> Iterator[tuple[str, bool, bool]]:
    return (tag for item in caption.items if (tag := _tag(item))[0])


@lru_cache(maxsize=4096)
def _tag(item: Item) -> tuple[str, bool, bool]:
    """(plain text, is core, is mood). The tags of a data set are few."""
    return plain_text(item), item.is_core, item.is_mood


@lru_cache(maxsize=4096)
def _identity(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"[\s_-]+", _identity(text)))


def _without_spacing(text: str) -> str:
    return "".join(_words(text))


def _singular(text: str) -> str:
    return " ".join(_singular_word(word) for word in _words(text))


def _singular_word(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _is_slip(word: str, other: str) -> bool:
    """Whether two words with the same first letter look like one word; numbers never do."""
    if any(character.isdigit() for character in word + other) or abs(len(word) - len(other)) > 2:
        return False
    return difflib.SequenceMatcher(None, word, other).ratio() >= _SIMILAR_WORDS
