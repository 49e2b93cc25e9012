"""The captions that somebody wrote: in metadata files and in text files beside the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_trainer.dataset.keys import CAPTION_ENDINGS, stem_of
from lora_trainer.dataset.listing import Listing, NameIndex, list_folder
from lora_trainer.dataset.metadata import METADATA_NAMES, CaptionProblem, path_problem, read_rows, read_text
from lora_trainer.errors import UserError

_SHOWN = 5  # how many files a message names
_TABLES, _LARGEST_TABLE = 20, 1 << 20  # that are looked into, although nobody named them; bytes


@dataclass(frozen=True, slots=True)
class CaptionSource:
    """A caption that somebody wrote, and where. ``kind``: "metadata" or "file"; ``line`` for metadata only."""

    text: str
    kind: str
    file: str
    line: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.file)


def read_captions(
    root: Path,
    metadata_path: str | Path | None = None,
    caption_extension: str = ".txt",
    *,
    problems: list[CaptionProblem] | None = None,
    listing: Listing | None = None,
) -> dict[str, CaptionSource]:
    """The captions that were written for the pictures of a folder, by key; pictures without one are not in it.

    metadata_path: this file goes before every metadata file found in the folder (each counts for its own folder and
        what is below, the nearest first). File names in it are relative to its folder or to ``root``.
    problems: collects what is wrong instead of raising, for a report.

    Raises:
        UserError: a caption file cannot be read as UTF-8, CSV or JSONL (only without ``problems``).
    """
    listing = listing or list_folder(root)
    found: list[CaptionProblem] = []
    captions: dict[str, CaptionSource] = {}
    names = NameIndex(listing)
    for key in listing.pictures:
        for name in _caption_keys(listing, names, key, caption_extension):
            text = read_text(listing.files[name])
            if isinstance(text, CaptionProblem):
                found.append(text)
                break
            if text.strip():
                captions[key] = CaptionSource(text.strip(), "file", listing.files.name(name))
                break
            found.append(CaptionProblem(listing.files[name], None, "is empty.", empty=True))
    for path in metadata_files(listing, metadata_path, found):
        rows = _read_metadata(path, listing, names, found)
        other = [key for key, row in rows.items() if key in captions and captions[key].text != row.text]
        if other:
            beside = captions[other[0]].path.name + ("" if len(other) == 1 else f" and {len(other) - 1} more")
            message = (
                f"counts, and {len(other)} of its captions are not those of {beside}. "
                "Remove the ones that are not meant."
            )
            found.append(CaptionProblem(path, None, message))
        captions.update(rows)
    if problems is not None:
        problems.extend(found)
    elif fatal := [problem for problem in found if problem.fatal]:
        raise UserError(some([str(problem) for problem in fatal], "\n"), remedy="Put it right, or remove the file.")
    return captions


def some(items: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(items[:_SHOWN])
    rest = f"and {len(items) - _SHOWN} more"
    return shown if len(items) <= _SHOWN else f"{shown}{separator}{rest}"


def caption_files(listing: Listing, names: NameIndex, key: str, extension: str) -> list[Path]:
    """The text files that may hold a picture's caption, the one that counts most first."""
    return [listing.files[name] for name in _caption_keys(listing, names, key, extension)]


def _caption_keys(listing: Listing, names: NameIndex, key: str, extension: str) -> Iterable[str]:
    extension = extension if extension.startswith(".") else f".{extension}"
    endings = dict.fromkeys((extension, *CAPTION_ENDINGS))
    wanted = (names.find_key(start + ending) for ending in endings for start in (stem_of(key), key))
    return dict.fromkeys(name for name in wanted if name is not None)


def metadata_files(
    listing: Listing, metadata_path: str | Path | None, problems: list[CaptionProblem]
) -> list[Path]:
    """Metadata files, the one that counts most last."""
    found: dict[str, list[Path]] = {}
    for key in listing.files:
        if key.casefold().endswith(METADATA_NAMES) and PurePosixPath(key).name.casefold() in METADATA_NAMES:
            found.setdefault(str(PurePosixPath(key).parent), []).append(listing.files[key])
    result = []
    for _, paths in sorted(found.items(), key=lambda item: (len(PurePosixPath(item[0]).parts), item[0])):
        chosen, *others = sorted(paths, key=lambda path: METADATA_NAMES.index(path.name.casefold()))
        for other in others:
            problems.append(CaptionProblem(other, None, f"is left out, because {chosen.name} is beside it."))
        result.append(chosen)
    if metadata_path:
        path = Path(metadata_path)
        if path.is_file():
            result = [other for other in result if not os.path.samefile(other, path)]
            result.append(path)
        else:
            problems.append(CaptionProblem(path, None, "there is no such file.", fatal=True))
    return result


def metadata_prefix(path: Path, root: Path) -> str:
    """What goes before the file names of a metadata file to make them keys: its own folder inside ``root``."""
    base = os.path.relpath(os.path.realpath(path.parent), os.path.realpath(root)).replace(os.sep, "/")
    return "" if base == "." or path_problem(base) else f"{base}/"


def _read_metadata(
    path: Path, listing: Listing, names: NameIndex, problems: list[CaptionProblem]
) -> dict[str, CaptionSource]:
    captions: dict[str, CaptionSource] = {}
    prefix = metadata_prefix(path, listing.root)
    before = len(problems)
    rows, lost = list(read_rows(path, problems, listing.root)), len(problems)
    for row in rows:
        key = names.find(prefix + row.filename) or names.find(row.filename) or names.find_below(row.filename)
        if key is None or key not in listing.pictures:
            message = f"{row.filename} is not in the folder; the row is left out."
            if key is not None:
                message = f"{row.filename} is no picture that can be trained on; the row is left out."
            problems.append(CaptionProblem(path, row.line, message))
        elif key in captions:
            message = f"names {row.filename} again; line {captions[key].line} counts."
            problems.append(CaptionProblem(path, row.line, message))
        else:
            captions[key] = CaptionSource(row.caption, "metadata", str(path), row.line)
    if rows and not captions:
        del problems[lost:]
        row = rows[0]
        message = (
            f"none of its {len(rows)} rows names a picture in {listing.root}. First, line {row.line}: "
            f"{row.filename} is not in the folder. Give file names as they are there."
        )
        problems.append(CaptionProblem(path, None, message, fatal=True))
    unusable = [problem for problem in problems[before:lost] if problem.line and not problem.fatal]
    if not rows and unusable and not any(problem.empty for problem in unusable):
        message = f"has no row that can be used. First, line {unusable[0].line}: {unusable[0].message}"
        problems[before:lost] = [CaptionProblem(path, None, message, fatal=True)]
    return captions


def unused_tables(
    listing: Listing, metadata_path: str | Path | None, captions: Mapping[str, CaptionSource]
) -> list[str]:
    """A sentence for each table in the data folder that is not read and has other captions than ``captions``."""
    names, told = NameIndex(listing), []
    used = [path.resolve() for path in metadata_files(listing, metadata_path, [])]
    tables = [key for key in listing.files if key.casefold().endswith((".csv", ".jsonl"))]
    for key in tables[:_TABLES]:
        path = listing.files[key]
        if path.resolve() in used or path.name.casefold() in METADATA_NAMES or path.stat().st_size > _LARGEST_TABLE:
            continue
        problems: list[CaptionProblem] = []
        rows = _read_metadata(path, listing, names, problems)
        other = [key for key, row in rows.items() if key not in captions or captions[key].text != row.text]
        if other and not any(problem.fatal for problem in problems):
            told.append(
                f"{key} has captions of {len(other)} pictures and is not used; to use it, name it in metadata_path "
                f"or call it metadata{path.suffix.lower()}."
            )
    return told
