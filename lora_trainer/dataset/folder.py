"""From a folder of pictures to the samples of a training run: which pictures, which captions, how often.

Where a picture's caption comes from, first match wins:
metadata.csv / metadata.jsonl > ``<image>`` + caption_extension > ``<image>.txt`` > ``<image>.caption`` >
the class tokens of a kohya folder ``<repeats>_<class>`` > default_caption > the trigger word > an error that names the
picture.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lora_trainer.config import TrainConfig, has_trigger, parse_folder, with_trigger
from lora_trainer.dataset import captions as grammar
from lora_trainer.dataset.caption_files import read_captions, some, unused_tables
from lora_trainer.dataset.images import IMAGE_EXTENSIONS, check_size, measure, open_image
from lora_trainer.dataset.known import KnownPictures, stamp
from lora_trainer.dataset.listing import KohyaFolders, Listing, folder_notes, list_folder, mask_of, masks_in
from lora_trainer.dataset.metadata import CaptionProblem
from lora_trainer.dataset.notes import with_notes
from lora_trainer.dataset.picture_edits import UNTOUCHED, load_edits
from lora_trainer.dataset.samples import Dataset, Sample, Size, Skipped
from lora_trainer.errors import UserError, concerning

REGULARIZATION_PREFIX = "reg:"
"""Starts the keys of regularization samples, so that they differ from those of the training folder."""

_Measured = tuple[Size, str] | str  # size and digest, or what is wrong
_MAX_WORKERS = 4  # pictures of up to 178 million pixels are decoded at once
_KINDS_SHOWN = 5
_NOTES_SHOWN = 3
_CAPTION_THEM = (
    "Write <picture>.txt beside each, add rows to metadata.csv, name the folder 1_<class>, set trigger_word, or let "
    "the caption command do it."
)
_CAPTION_THE_CLASS = (
    "Write <picture>.txt beside each, add rows to metadata.csv, name the folder 1_<class> (such as 1_dog)."
)


class UncaptionedError(UserError):
    """Pictures have no caption, nor anything that stands for one."""


def scan(
    config: TrainConfig,
    progress: Callable[[int, int], None] | None = None,
    measure: Callable[[Path], tuple[Size, str]] = measure,
    stand_in: str = "",
    known: KnownPictures | None = None,
) -> Dataset:
    """The training set of a configuration. Every picture is decoded once, so that damaged ones are found now.

    progress: called with (pictures done, pictures in all).
    measure: what tells a picture's (width, height) and digest or raises ``UserError``; the dataset checks, which have
        looked at every picture already, give what they know.
    stand_in: the caption of training pictures that have none yet; "" refuses them, a space says that none is needed.
    known: pictures and masks that it has and that have not changed are not decoded; the others are added to it.

    Raises:
        UncaptionedError: a picture without any caption.
        UserError: no folder, no usable picture, an unreadable caption file.
    """
    if not config.train_data_dir:
        raise UserError("is empty.", field="train_data_dir", remedy="Name the folder that holds the pictures.")
    sources = _sources(config, stand_in)
    roots = [source.root for source in sources]
    results = [*folders_of_results(config), *([Path(config.mask_dir)] if config.mask_dir else [])]

    def examined(listing: Listing) -> list[_Measured]:
        return _measure_all(listing, config.use_masks, progress, measure, known)

    parts = [
        _scan_root(config, source, [*results, *(root for root in roots if root != source.root)], examined)
        for source in sources
    ]
    if known is not None:
        known.save()
    whole = Dataset(
        parts[0].root,
        tuple(sample for part in parts for sample in part.samples),
        tuple(skipped for part in parts for skipped in part.skipped),
        tuple(warning for part in parts for warning in part.warnings),
    )
    return with_notes(_translated(_with_trigger(whole, config), config), config)


@dataclass(frozen=True)
class _Source:
    """A folder that is read. prefix: before the keys of its pictures. setting: that names it. repeats: of its
    pictures, whatever their folders' names say; None leaves it to those and to ``repeats``. stand_in: the caption of
    pictures without one, after the class in their folder's name."""

    root: Path
    setting: str
    prefix: str = ""
    repeats: int | None = None
    words: str = ""
    stand_in: str = ""
    is_regularization: bool = False


def _sources(config: TrainConfig, stand_in: str) -> list[_Source]:
    """The training folders first, then that of the regularization pictures."""
    sources = [_Source(Path(config.train_data_dir), "train_data_dir", stand_in=stand_in)]
    for number, entry in enumerate(config.more_folders, start=2):
        repeats, words, path = parse_folder(entry)
        sources.append(_Source(Path(path), "more_folders", f"{number}:", repeats, words, stand_in))
    if config.reg_data_dir:
        sources.append(
            _Source(Path(config.reg_data_dir), "reg_data_dir", REGULARIZATION_PREFIX, is_regularization=True)
        )
    return sources


def folders_of_results(config: TrainConfig) -> list[Path]:
    """What a run itself writes, which is no data: previews are pictures, and output_dir may be the data folder."""
    output = Path(config.output_dir)
    return [output, output / "previews", *([Path(config.cache_dir)] if config.cache_dir else [])]


def _translated(dataset: Dataset, config: TrainConfig) -> Dataset:
    """The data set with ``caption_mapping`` applied to its captions. Raises UserError for an unreadable file."""
    if not config.caption_mapping:
        return dataset
    with concerning("caption_mapping"):
        mapping = grammar.load_mapping(config.caption_mapping)
    samples, matched = [], False
    for sample in dataset.samples:
        lines = [grammar.parse(line) for line in sample.caption.splitlines()]
        translated = [grammar.translate(line, mapping) for line in lines]
        matched |= translated != lines
        samples.append(dataclasses.replace(sample, caption="\n".join(map(grammar.format, translated))))
    notes = [
        f"caption_mapping has no effect: no caption of {len(samples)} pictures holds one of its {len(mapping)} terms."
    ]
    warned = (*dataset.warnings, *([] if matched else notes))
    return dataclasses.replace(dataset, samples=tuple(samples), warnings=warned)


def _with_trigger(dataset: Dataset, config: TrainConfig) -> Dataset:
    """The data set with the trigger word in place of ``[trigger]``, as ai-toolkit's users write it."""
    word = config.trigger_word.strip()
    if not word:
        return dataset
    samples = tuple(
        sample
        if sample.is_regularization or not has_trigger(sample.caption)
        else dataclasses.replace(sample, caption=with_trigger(sample.caption, word))
        for sample in dataset.samples
    )
    return dataclasses.replace(dataset, samples=samples)


def _scan_root(
    config: TrainConfig,
    source: _Source,
    exclude: Sequence[Path],
    examined: Callable[[Listing], list[_Measured]],
) -> Dataset:
    root, setting, is_regularization = source.root, source.setting, source.is_regularization
    try:
        listing = list_folder(root, exclude)
    except UserError as error:
        raise UserError(error.message, field=setting, remedy=error.remedy) from None
    problems: list[CaptionProblem] = []
    metadata_path = config.metadata_path if setting == "train_data_dir" else None
    captions = read_captions(root, metadata_path, config.caption_extension, problems=problems, listing=listing)
    if fatal := [problem for problem in problems if problem.fatal]:
        setting = "metadata_path" if metadata_path and str(fatal[0].path) == str(metadata_path) else setting
        raise UserError(some([str(problem) for problem in fatal], "\n"), field=setting)
    row_notes = [str(problem) for problem in problems[:_NOTES_SHOWN]]
    if len(problems) > _NOTES_SHOWN:
        more = len(problems) - _NOTES_SHOWN
        row_notes.append(f"{more} more captions or rows have problems; check the folder to see all.")
    if config.mask_dir and not is_regularization:
        with concerning("mask_dir"):
            found_there = masks_in(Path(config.mask_dir), listing)
        listing = dataclasses.replace(listing, masks={**listing.masks, **found_there})
    notes = [*listing.warnings, *row_notes, *folder_notes(listing), *unused_tables(listing, metadata_path, captions)]

    edits = load_edits(root)
    skipped = list(listing.skipped)
    excluded = {key: True for key in listing.pictures if edits.get(key, UNTOUCHED).excluded}  # in their order
    skipped += [Skipped(listing.pictures[key], "it is excluded in the editor") for key in excluded]
    listing = listing.without(excluded)
    folders = KohyaFolders(root)
    samples: list[Sample] = []
    without_caption: list[Path] = []
    for key, found in zip(listing.pictures, examined(listing)):
        repeats, class_tokens = folders.above(key) or (config.repeats, "")
        if source.repeats is not None:
            repeats, class_tokens = source.repeats, source.words
        if isinstance(found, str):
            skipped.append(Skipped(listing.pictures[key], found))
            continue
        if repeats == 0:
            skipped.append(Skipped(listing.pictures[key], "its folder's name says 0 repeats"))
            continue
        written = captions.get(key)
        texts = {os.path.basename(written.file): written.text} if written else {}
        texts["folder"] = class_tokens
        if not is_regularization:
            texts |= {"default_caption": config.default_caption.strip(), "trigger_word": config.trigger_word.strip()}
        caption_from, caption = next(((name, text) for name, text in texts.items() if text), ("", source.stand_in))
        if not caption:
            without_caption.append(listing.pictures[key])
            continue
        size, digest = found
        edit = edits.get(key, UNTOUCHED)
        try:
            if edit.changes_pixels:
                check_size(listing.pictures[key], edit.size(size))
        except UserError as error:
            skipped.append(Skipped(listing.pictures[key], error.message))
            continue
        samples.append(
            Sample(
                listing.pictures.name(key), source.prefix + key, caption, edit.size(size), edit.digest(digest), repeats,
                is_regularization, mask_of(listing, key), edit, caption_from,
            )
        )  # fmt: skip
    if without_caption:
        raise UncaptionedError(
            f"{len(without_caption)} of {len(listing.pictures)} pictures have no caption: "
            f"{some([str(path) for path in without_caption])}." + "".join(f"\n{note}" for note in row_notes[:3]),
            field=setting,
            remedy=_CAPTION_THE_CLASS if is_regularization else _CAPTION_THEM,
        )
    if not samples:
        raise _nothing_found(listing, skipped, setting)
    missing = [key for key in listing.pictures if key not in captions]
    if captions and missing and not source.stand_in.isspace():
        notes.append(f"{len(missing)} pictures have no caption of their own: {some(missing)}.")
    return Dataset(root, tuple(samples), tuple(skipped), tuple(notes))


def _measure_all(
    listing: Listing,
    use_masks: bool,
    progress: Callable[[int, int], None] | None,
    measure: Callable[[Path], tuple[Size, str]],
    known: KnownPictures | None,
) -> list[_Measured]:
    """(size, digest) of every picture, or the reason why it cannot be used."""
    results: list[_Measured | None] = [None] * len(listing.pictures)
    masks = {key: str(mask) for key, mask in listing.masks.items()} if use_masks else {}
    if known is not None:
        results = [
            known.get(listing.pictures.name(key)) if key not in masks or known.is_intact_mask(masks[key]) else None
            for key in listing.pictures
        ]

    def examine(key: str) -> _Measured:
        name, mask = listing.pictures.name(key), masks.get(key)
        before = None if known is None else stamp(name)
        mask_before = None if known is None or mask is None else stamp(mask)
        try:
            mask_size = None if mask is None else open_image(Path(mask)).size
            found = measure(listing.pictures[key])
        except UserError as error:
            return error.message
        if known is not None:
            known.add(name, before, *found)
            if mask is not None and mask_size is not None:
                known.add_mask(mask, mask_before, mask_size)
        return found

    total = len(results)
    missing = [(place, key) for place, key in enumerate(listing.pictures) if results[place] is None]
    if progress is not None and len(missing) < total:
        progress(total - len(missing), total)
    with warnings.catch_warnings():
        # What Pillow warns of (odd EXIF data, large pictures) is either harmless or found by ``measure``.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
            examined = cast(Generator[_Measured, None, None], pool.map(examine, [key for _, key in missing]))
            with closing(examined):  # which cancels those that are left, when progress raises
                for done, ((place, _), result) in enumerate(zip(missing, examined), start=total - len(missing) + 1):
                    results[place] = result
                    if progress is not None:
                        progress(done, total)
    return [result for result in results if result is not None]


def _nothing_found(listing: Listing, skipped: Sequence[Skipped], setting: str) -> UserError:
    if skipped:
        reasons = some([f"{item.path.name}: {item.reason}" for item in skipped], "\n")
        return UserError(f"No picture in {listing.root} can be used:\n{reasons}", field=setting)
    kinds = Counter(path.suffix.casefold() or "no ending" for path in listing.files.values())
    there = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common(_KINDS_SHOWN)) or "nothing"
    return UserError(
        f"No pictures in {listing.root}: looked there and in its sub-folders for {', '.join(IMAGE_EXTENSIONS)}; "
        f"found {there}.",
        field=setting,
        remedy="Put pictures in the folder, or name the folder that holds them.",
    )
