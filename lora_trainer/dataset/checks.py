"""The checks of a data set: what would stop or spoil a training, found before it starts."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_trainer.config import TrainConfig, with_trigger
from lora_trainer.dataset.buckets import BatchPlan
from lora_trainer.dataset.caption_checks import check_captions, orphans
from lora_trainer.dataset.caption_files import read_captions
from lora_trainer.dataset.captions import parse
from lora_trainer.dataset.findings import Finding, Report, Severity, enumerate_some
from lora_trainer.dataset.folder import scan
from lora_trainer.dataset.images import measure
from lora_trainer.dataset.inspection import Picture, inspect
from lora_trainer.dataset.listing import KohyaFolders, Listing, folder_notes, list_folder
from lora_trainer.dataset.metadata import CaptionProblem
from lora_trainer.dataset.notes import notes
from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit, load_edits
from lora_trainer.dataset.samples import Dataset
from lora_trainer.dataset.similarity import find_pairs
from lora_trainer.errors import UserError

__all__ = ["Finding", "Report", "check_folder"]

WARN_ASPECT, ERROR_ASPECT = 2.0, 3.0
BLURRED = 100.0
"""Variance of the Laplacian at 512 pixels below which a picture may be blurred …"""
BLURRED_SHARE, BLURRED_TILE = 0.25, 60.0
"""… and is reported as such when its sharpest part is below this share of the set's median, or below this variance. A
portrait with a soft background is below ``BLURRED`` as a whole (one in focus was seen at 91) and is not blurred."""
FLAT_STEEPNESS = 0.6
"""Flat drawings have too few edges for a variance. Their steepest one counts: 1.4 when clean, 0.2 when blurred."""
DARK_LEVEL, BRIGHT_LEVEL = 45.0, 230.0
"""Grey levels: 95 % of the pixels darker, or 95 % brighter (99.5 % in flat drawings, which have white paper)."""

_MAX_WORKERS = 4  # pictures of up to 178 million pixels are decoded at once
_SEVERITIES = ("error", "warning", "info")
_PAIR_TEXTS: dict[str, tuple[Severity, str, str]] = {
    "duplicate": (
        "warning",
        "The picture is the same file as {0}.",
        "Remove one; to see a picture more often, raise its repeats.",
    ),
    "near-duplicate": (
        "warning",
        "The picture shows the same as {0}.",
        "Remove the worse one: twins weigh double in what is learned.",
    ),
    "changed-copy": (
        "warning",
        "The picture is {0} made brighter, darker or grey, mirrored, cropped or turned.",
        "Remove one: copies weigh double in what is learned. The setting flip mirrors pictures by itself.",
    ),
    "similar": (
        "info",
        "The picture looks much like {0}.",
        "Look at both; keep them if they differ in something that matters.",
    ),
}


def check_folder(
    root: str | Path,
    *,
    resolution: int | tuple[int, int] = 512,
    trigger_word: str = "",
    metadata_path: str | Path | None = None,
    caption_extension: str = ".txt",
    batch_size: int = 1,
    count_tokens: Callable[[str], int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every picture (each is decoded once) and caption of a data folder.

    resolution: pixels of the training's side, or (width, height).
    count_tokens: the number of tokens of a text, as the model's tokenizer counts them; estimated without it.
    progress: called with (pictures done, pictures in all); what it raises ends the check.

    Raises:
        UserError: there is no such folder.
    """
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    config = TrainConfig(
        train_data_dir=str(root),
        metadata_path=str(metadata_path) if metadata_path else None,
        caption_extension=caption_extension,
        trigger_word=trigger_word,
        batch_size=batch_size,
    )
    listing = list_folder(Path(root))
    edits = load_edits(listing.root)
    excluded = dict.fromkeys(key for key in listing.pictures if edits.get(key, UNTOUCHED).excluded)
    listing = listing.without(excluded)
    problems: list[CaptionProblem] = []
    sources = read_captions(listing.root, metadata_path, caption_extension, problems=problems, listing=listing)
    looked_at = _inspect_all(listing, edits, progress)
    pictures = {key: found for key, found in looked_at.items() if isinstance(found, Picture)}
    captions = {
        key: parse(with_trigger(source.text, trigger_word)) for key, source in sources.items() if key in pictures
    }

    findings = list(_folder_findings(listing, problems))
    findings += [
        Finding(key, "unreadable", "error", found.message, "Replace the file or remove it; training leaves it out.")
        for key, found in looked_at.items()
        if isinstance(found, UserError)
    ]
    if excluded:
        message = f"{len(excluded)} pictures are excluded: {enumerate_some(list(excluded))}."
        findings.append(Finding("", "excluded", "info", message, "Include them in the editor, if they are to count.",
                                files=tuple(excluded)))  # fmt: skip
    findings += _check_pictures(pictures, min(sides))
    findings += _check_likeness(pictures)
    findings += orphans(listing)
    findings += _without_caption(listing, pictures, set(sources), problems, trigger_word)
    findings += check_captions(captions, trigger_word, count_tokens)

    dataset, refusal = _scan(config, listing, looked_at)
    if refusal:
        remedy = refusal.remedy or "Put right the errors of this report first."
        findings.append(Finding("", "cannot-train", "error", refusal.message, remedy))
    if dataset:
        findings += _settings_findings(dataset, config)
    plan = BatchPlan(dataset, sides, batch_size=batch_size, multiple=1) if dataset else None
    findings.sort(key=lambda finding: (_SEVERITIES.index(finding.severity), finding.file, finding.kind))
    return Report(
        findings=tuple(findings),
        images=len(pictures),
        captions=len(captions),
        buckets=tuple(plan.table()) if plan else (),
        steps_preview={
            "visits_per_epoch": sum(sample.repeats for sample in dataset.samples) if dataset else 0,
            "batch_size": batch_size,
            "steps_per_epoch": plan.steps_per_epoch if plan else 0,
        },
        stops_training=refusal is not None,
    )


def _inspect_all(
    listing: Listing, edits: Mapping[str, PictureEdit], progress: Callable[[int, int], None] | None
) -> dict[str, Picture | UserError]:
    def look(key: str) -> Picture | UserError:
        try:
            return inspect(listing.pictures[key], edits.get(key, UNTOUCHED))
        except UserError as error:
            return error

    found: dict[str, Picture | UserError] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata, large pictures: what matters is checked
        with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
            try:
                for key, result in zip(listing.pictures, pool.map(look, listing.pictures)):
                    found[key] = result
                    if progress is not None:
                        progress(len(found), len(listing.pictures))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # a cancelled check does not look at the other 2,000
                raise
    return found


def _scan(
    config: TrainConfig, listing: Listing, looked_at: Mapping[str, Picture | UserError]
) -> tuple[Dataset | None, UserError | None]:
    """The data set as a training would see it, or why it would refuse; no picture is decoded again."""
    known = {listing.pictures[key]: found for key, found in looked_at.items()}

    def measured(path: Path) -> tuple[tuple[int, int], str]:
        found = known.get(path)
        if found is None:  # it appeared since
            return measure(path)
        if isinstance(found, UserError):
            raise found
        return found.original_size, found.digest

    try:
        return scan(config, measure=measured), None
    except UserError as error:
        return None, error


def _settings_findings(dataset: Dataset, config: TrainConfig) -> Iterator[Finding]:
    """What a training without further settings would say of these pictures."""
    for note in notes(dataset, config):
        keys = tuple(sample.key for sample in note.samples)
        remedy = note.remedy or "Nothing needs doing if that is meant."
        yield Finding("", "settings", "warning", note.message, remedy, files=keys)


def _folder_findings(listing: Listing, problems: Sequence[CaptionProblem]) -> Iterator[Finding]:
    for skipped in listing.skipped:
        remedy = "Put it right, or leave it: training does without it."
        yield Finding(_relative(listing, skipped.path), "left-out", "warning", f"Left out: {skipped.reason}.", remedy)
    for note in (*listing.warnings, *folder_notes(listing)):
        yield Finding("", "folder", "warning", note, "Nothing needs doing if that is meant.")
    for problem in problems:
        if problem.empty and problem.line is None:
            continue  # reported for its picture
        place = f"Line {problem.line}"
        yield Finding(
            _relative(listing, problem.path),
            "empty-caption" if problem.empty else "caption-file",
            "error" if problem.fatal else "warning",
            f"{place}: {problem.message}" if problem.line else problem.message,
            "Describe the picture." if problem.empty else "Correct the file; nothing in it was changed.",
        )


def _relative(listing: Listing, path: Path) -> str:
    try:
        return path.relative_to(listing.root).as_posix()
    except ValueError:  # a metadata file that lies elsewhere
        return str(path)


def _check_pictures(pictures: Mapping[str, Picture], target: int) -> Iterator[Finding]:
    sharp = statistics.median([picture.sharpest for picture in pictures.values() if not picture.is_flat] or [0.0])
    for key, picture in pictures.items():
        short, long = sorted(picture.size)
        shown = f"{picture.size[0]}×{picture.size[1]}"
        if short < target:
            severity: Severity = "error" if 2 * short < target else "warning"
            remedy = f"Use a larger original, or train at {max(64, short // 64 * 64)}."
            message = f"The picture has {shown} pixels; training at {target} enlarges it."
            yield Finding(key, "too-small", severity, message, remedy)
        if long > WARN_ASPECT * short:
            severity = "error" if long > ERROR_ASPECT * short else "warning"
            message = f"The picture is {long / short:.1f} times as long as it is wide ({shown})."
            yield Finding(key, "aspect-ratio", severity, message, "Crop it to the subject, to 2:1 or less.")
        if picture.orientation != 1:
            message = f"The picture is stored turned or mirrored (EXIF orientation {picture.orientation})."
            yield Finding(key, "rotated", "info", message, "Nothing needs doing: training turns it upright.")
        if picture.mode == "CMYK":
            remedy = "Nothing needs doing: training converts it to sRGB. Look whether its colors are right."
            yield Finding(key, "cmyk", "info", "The picture is in CMYK, the colors of print.", remedy)
        if picture.deep:
            remedy = "Nothing needs doing: training scales it to 8 bits."
            yield Finding(key, "16-bit", "info", "The picture has more than 8 bits per channel.", remedy)
        if picture.transparent:
            remedy = "Nothing needs doing: training puts it on white. With use_masks it learns the opaque part only."
            yield Finding(key, "transparent", "info", "The picture has transparent parts.", remedy)
        if picture.animated:
            remedy = "Nothing needs doing, or save the frame that you want."
            yield Finding(key, "animated", "info", "The picture is animated; its first frame is used.", remedy)
        paper, low, high = picture.levels
        if high < DARK_LEVEL:
            yield Finding(key, "dark", "warning", "The picture is very dark.", "Brighten it or leave it out.")
        elif (paper if picture.is_flat else low) > BRIGHT_LEVEL:
            yield Finding(key, "bright", "warning", "The picture is very bright.", "Darken it or leave it out.")
        elif _is_blurred(picture, sharp):  # without contrast there is no telling
            remedy = "Leave it out, unless the blur is what you want to learn."
            yield Finding(key, "blurred", "warning", "The picture looks blurred.", remedy)


def _is_blurred(picture: Picture, usual: float) -> bool:
    if picture.is_flat:
        return 0 < picture.steepness < FLAT_STEEPNESS
    return picture.sharpness < BLURRED and picture.sharpest < max(BLURRED_TILE, BLURRED_SHARE * usual)


def _check_likeness(pictures: Mapping[str, Picture]) -> Iterator[Finding]:
    """Of two that are alike the smaller one is named, as the one that may go."""
    keys = list(pictures)
    for pair in find_pairs(list(pictures.values())):
        severity, message, remedy = _PAIR_TEXTS[pair.kind]
        both = keys[pair.first], keys[pair.second]
        files = tuple(sorted(both, key=lambda key: -math.prod(pictures[key].size)))
        yield Finding(files[1], pair.kind, severity, message.format(files[0]), remedy, files=files)


def _without_caption(
    listing: Listing,
    pictures: Mapping[str, Picture],
    captioned: set[str],
    problems: Sequence[CaptionProblem],
    trigger_word: str,
) -> Iterator[Finding]:
    """Pictures that nobody described. Training takes their folder's class tokens or the trigger word instead."""
    empty: dict[Path, list[Path]] = {}  # without its ending -> empty caption files
    for problem in problems:
        if problem.empty:
            empty.setdefault(problem.path.with_suffix(""), []).append(problem.path)
    folders = KohyaFolders(listing.root)
    lacking = [key for key in pictures if key not in captioned]
    if lacking and len(lacking) == len(pictures) and not empty:
        stand_in = bool(trigger_word) or any(map(folders.above, lacking))
        message = "No picture has a caption."
        if stand_in:
            message = "No picture has a caption; each is trained with the same words."
        remedy = "Describe them, or let the caption command do it."
        yield Finding("", "no-captions", "info" if stand_in else "error", message, remedy)
        return
    for key in lacking:
        path = listing.pictures[key]
        files = [*empty.get(path, ()), *empty.get(path.with_suffix(""), ())]
        stand_in = bool(trigger_word or folders.above(key))
        # Whole sentences, which can be translated.
        if files:
            kind, message = "empty-caption", f"The caption file {files[0].name} is empty."
        else:
            kind, message = "no-caption", "The picture has no caption."
        if stand_in:
            message = f"{message} The trigger word or class stands in."
        yield Finding(key, kind, "warning" if stand_in else "error", message, "Describe the picture.")
