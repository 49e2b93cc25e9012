"""What a run learned from: numbers, and a look at it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.config import TrainConfig
from lora_trainer.dataset.captions import parse, plain_texts
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.held_out import hold_out
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.dataset.text.rows import read_rows
from lora_trainer.dataset.thumbnails import small_picture
from lora_trainer.errors import UserError
from lora_trainer.report.html import Html, element
from lora_trainer.report.pictures import THUMBNAIL, data_address
from lora_trainer.report.words import Words

MOST_THUMBNAILS = 48
_TAGS = 24
_LONGEST = 400  # letters of a row that are shown
_ROWS = 5


@dataclass(frozen=True)
class Facts:
    """numbers: (name, value) as the page shows them. shown: pictures or rows, as HTML. missing: why there is less."""

    numbers: Sequence[tuple[str, str]]
    shown: Sequence[Html] = ()
    missing: str = ""


def facts_of(config: TrainConfig, metadata: Mapping[str, str], is_text: bool, words: Words) -> Facts:
    """What is there now; what is not any more is said by the LoRA's own metadata, as far as it goes."""
    try:
        return _of_rows(config, words) if is_text else _of_pictures(config, metadata, words)
    except (UserError, OSError):
        known = words("What was trained on is not there any more.")
        return Facts(_from_metadata(metadata, words), missing=known)


def _of_pictures(config: TrainConfig, metadata: Mapping[str, str], words: Words) -> Facts:
    dataset = scan(config, stand_in=config.trigger_word or "–")
    held = _held_out(config, dataset)
    own = [sample for sample in dataset.samples if not sample.is_regularization]
    regularization = len(dataset.samples) - len(own)
    sizes = [min(sample.size) for sample in own]
    tags = Counter(text for sample in own for text in plain_texts(parse(sample.caption)))
    numbers = [
        (words("Pictures"), str(len(own))),
        (words("of them held out"), str(len(held)) if held else ""),
        (words("Regularization pictures"), str(regularization) if regularization else ""),
        (words("Shorter side"), words("{low} to {high} pixels", low=min(sizes), high=max(sizes))),
        (words("Frequent in captions"), ", ".join(f"{text} {count}" for text, count in tags.most_common(_TAGS))),
        *_buckets(metadata, words),
    ]
    shown = [picture for sample in own[:MOST_THUMBNAILS] if (picture := _thumbnail(sample, held, words)) is not None]
    more = len(own) - MOST_THUMBNAILS
    return Facts(
        [pair for pair in numbers if pair[1]],
        shown + ([element("p", words("and {n} more", n=more))] if more > 0 else []),
    )


def _held_out(config: TrainConfig, dataset: Dataset) -> set[str]:
    if not config.validation_share:
        return set()
    return {sample.key for sample in hold_out(dataset, config.validation_share, config.seed).held_out.samples}


def _thumbnail(sample: Sample, held: set[str], words: Words) -> Html | None:
    try:
        address = data_address(small_picture(sample.path, sample.edit, THUMBNAIL), THUMBNAIL)
    except (UserError, OSError):
        return None
    note = element("i", words("held out")) if sample.key in held else None
    picture = element("img", src=address, alt="")
    return element("figure", picture, element("figcaption", note, sample.caption), title=sample.caption)


def _of_rows(config: TrainConfig, words: Words) -> Facts:
    rows, bad = read_rows(Path(config.train_data_dir))
    texts = [" ".join(message.text for message in row.messages) for row in rows]
    letters = sorted(map(len, texts))
    numbers = [
        (words("Rows"), str(len(rows))),
        (words("of them cannot be read"), str(len(bad)) if bad else ""),
        (words("Letters in a row"), words("{low} to {high}", low=letters[0], high=letters[-1]) if letters else ""),
    ]
    shown = []
    for row in rows[:_ROWS]:
        messages = [element("p", element("b", f"{one.role}: "), one.text[:_LONGEST]) for one in row.messages]
        shown.append(element("blockquote", *messages))
    return Facts([pair for pair in numbers if pair[1]], shown)


def _from_metadata(metadata: Mapping[str, str], words: Words) -> list[tuple[str, str]]:
    frequency = _read(metadata.get("ss_tag_frequency"))
    tags: Counter[str] = Counter()
    for folder in frequency.values():
        tags.update({str(tag): count for tag, count in folder.items()} if isinstance(folder, dict) else {})
    folders = [one for one in _read(metadata.get("ss_dataset_dirs")).values() if isinstance(one, dict)]
    pictures = sum(int(one.get("img_count", 0)) for one in folders)
    numbers = [
        (words("Pictures"), str(pictures) if pictures else ""),
        (words("Frequent in captions"), ", ".join(f"{text} {count}" for text, count in tags.most_common(_TAGS))),
        *_buckets(metadata, words),
    ]
    return [pair for pair in numbers if pair[1]]


def _buckets(metadata: Mapping[str, str], words: Words) -> list[tuple[str, str]]:
    buckets = _read(_read(metadata.get("ss_bucket_info")).get("buckets"))
    rows = [one for one in buckets.values() if isinstance(one, dict) and len(one.get("resolution", ())) == 2]
    said = ", ".join("{}×{} ({})".format(*one["resolution"], one.get("count", "?")) for one in rows)
    return [(words("Trained sizes"), said)]


def _read(value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    try:
        found = json.loads(value) if isinstance(value, str) else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
