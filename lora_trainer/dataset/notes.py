"""What a person should know of a data set beside these settings: above all, which of them change nothing here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lora_trainer.config import TrainConfig, has_trigger
from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.captions import has_choices, has_weights, parse
from lora_trainer.dataset.images import reading
from lora_trainer.dataset.listing import KohyaFolders
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError


@dataclass(frozen=True)
class Note:
    """samples: the pictures that it is about, where it is not about all of them."""

    message: str
    remedy: str = ""
    samples: Sequence[Sample] = ()

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def with_notes(dataset: Dataset, config: TrainConfig) -> Dataset:
    """The data set with further warnings."""
    return dataclasses.replace(dataset, warnings=(*dataset.warnings, *map(str, notes(dataset, config))))


def notes(dataset: Dataset, config: TrainConfig) -> Iterator[Note]:
    """What ``with_notes`` adds, one by one."""
    training = [sample for sample in dataset.samples if not sample.is_regularization]
    pictures = len(training)
    yield from _caption_notes(dataset, config, training, pictures)
    masked = [sample for sample in training if sample.mask_path is not None]
    if masked and not config.use_masks:
        message = f"{len(masked)} of {pictures} pictures have a mask, and use_masks is off: the masks are not used."
        yield Note(message, samples=masked)
    if config.use_masks and not masked and not any(_may_be_transparent(sample) for sample in training):
        yield Note(f"use_masks has no effect: none of {pictures} pictures has a mask or transparency.")
    folders = KohyaFolders(dataset.root)
    if config.repeats != 1 and all(folders.above(sample.key) for sample in training):
        yield Note(f"repeats: {config.repeats} has no effect: the folders of all {pictures} pictures say their own.")


def _caption_notes(
    dataset: Dataset, config: TrainConfig, training: Sequence[Sample], pictures: int
) -> Iterator[Note]:
    if literal := [sample for sample in training if has_trigger(sample.caption)]:
        message = f"{len(literal)} captions hold [trigger], and trigger_word is empty: {_some(literal)}."
        yield Note(message, "Set trigger_word.", literal)
    choices = [sample for sample in dataset.samples if has_choices(sample.caption)]
    if choices and not config.wildcards:
        message = (
            f"{len(choices)} captions have several lines or {{a|b}}, which are read as one text: {_some(choices)}."
        )
        yield Note(message, "With wildcards: true one of them is taken each time the picture is seen.", choices)
    if config.wildcards and not choices:
        yield Note(f"wildcards has no effect: no caption of {pictures} pictures has several lines or {{a|b}}.")
    if config.shuffle_tags and not any(len(parse(sample.caption).items) > 1 for sample in training):
        yield Note(f"shuffle_tags has no effect: no caption of {pictures} pictures has more than one part.")
    captions = [parse(sample.caption) for sample in dataset.samples]
    if config.tag_dropout > 0 and not any(len(caption.items) > 1 for caption in captions):
        yield Note(f"tag_dropout leaves out whole captions: no caption of {pictures} pictures has more than one part.")
    if config.weighted_captions and not any(map(has_weights, captions)):
        yield Note(f"weighted_captions has no effect: no caption of {pictures} pictures has a weight.")
    separator = config.secondary_separator
    if separator and not any(separator in sample.caption for sample in dataset.samples):
        yield Note(f"secondary_separator has no effect: no caption of {pictures} pictures holds {separator}.")
    if config.default_caption.strip() and all(sample.caption_from != "default_caption" for sample in training):
        yield Note(f"default_caption has no effect: each of {pictures} pictures has a caption without it.")
    ending = config.caption_extension
    if ending != TrainConfig().caption_extension and not any(
        sample.caption_from.casefold().endswith(ending.casefold()) for sample in dataset.samples
    ):
        yield Note(
            f"caption_extension: {ending} has no effect: no caption of {pictures} pictures comes from such a file."
        )


def _some(samples: Sequence[Sample]) -> str:
    return some([sample.key for sample in samples])


def _may_be_transparent(sample: Sample) -> bool:
    with suppress(UserError), reading(sample.path) as (image, _):
        return "A" in image.mode or image.mode == "P" or "transparency" in image.info
    return False
