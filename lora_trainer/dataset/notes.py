"""What a person should know of a data set beside these settings: above all, which of them change nothing here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress

from lora_trainer.config import TrainConfig, has_trigger
from lora_trainer.dataset.caption_files import some
from lora_trainer.dataset.captions import has_choices, parse
from lora_trainer.dataset.images import reading
from lora_trainer.dataset.listing import kohya_folder
from lora_trainer.dataset.samples import Dataset, Sample
from lora_trainer.errors import UserError


def with_notes(dataset: Dataset, config: TrainConfig) -> Dataset:
    """The data set with further warnings."""
    return dataclasses.replace(dataset, warnings=(*dataset.warnings, *_notes(dataset, config)))


def _notes(dataset: Dataset, config: TrainConfig) -> Iterator[str]:
    training = [sample for sample in dataset.samples if not sample.is_regularization]
    pictures = f"{len(training)} pictures"
    masks = sum(sample.mask_path is not None for sample in training)
    if masks and not config.use_masks:
        yield f"{masks} of {pictures} have a mask, and use_masks is off: the masks are left out."
    if config.use_masks and not masks and not any(_may_be_transparent(sample) for sample in training):
        yield f"use_masks has no effect: none of {pictures} has a mask or transparency."
    if literal := [sample.key for sample in training if has_trigger(sample.caption)]:
        yield f"{len(literal)} captions hold [trigger], and trigger_word is empty: {some(literal)}. Set trigger_word."
    choices = [sample.key for sample in dataset.samples if has_choices(sample.caption)]
    if choices and not config.wildcards:
        yield (
            f"{len(choices)} captions have several lines or {{a|b}}, which are read as one text: {some(choices)}. "
            "With wildcards: true one of them is taken at each visit."
        )
    if config.wildcards and not choices:
        yield f"wildcards has no effect: no caption of {pictures} has several lines or {{a|b}}."
    if config.shuffle_tags and not any(len(parse(sample.caption).items) > 1 for sample in training):
        yield f"shuffle_tags has no effect: no caption of {pictures} has more than one part."
    named = [sample for sample in training if kohya_folder(dataset.root, sample.key)]
    if config.repeats != 1 and len(named) == len(training):
        yield f"repeats: {config.repeats} has no effect: the folders of all {pictures} say their own."


def _may_be_transparent(sample: Sample) -> bool:
    with suppress(UserError), reading(sample.path) as (image, _):
        return "A" in image.mode or image.mode == "P" or "transparency" in image.info
    return False
