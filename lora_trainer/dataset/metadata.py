"""Reading metadata.csv and metadata.jsonl: rows of picture and caption, each with the line it stands on.

A file that is not what it claims to be (not UTF-8, an open quote, broken JSON) is an error: half of the captions would
silently be missing. A row that cannot be used (a file that is not there, no caption) is a warning, and is left out.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.errors import has_half_characters

FILENAME_COLUMNS = ("filename", "file_name", "image", "file", "image_path", "path")
CAPTION_COLUMNS = ("prompt", "text", "caption")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")

_MAX_BYTES = 256 << 20
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class CaptionProblem:
    """What is wrong with a caption file. ``fatal``: no training before it is put right; ``empty``: a caption is there
    and has no text."""

    path: Path
    line: int | None
    message: str
    fatal: bool = False
    empty: bool = False

    def __str__(self) -> str:
        place = f"{self.path.name}, line {self.line}" if self.line else self.path.name
        return f"{place}: {self.message}"


@dataclass(frozen=True)
class Row:
    line: int
    filename: str
    caption: str


def read_text(path: Path) -> str | CaptionProblem:
    """The text of a UTF-8 file (a byte order mark is dropped), or what keeps it from being read as one."""
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                return CaptionProblem(path, None, "is larger than 256 MB; that is no caption file.", fatal=True)
            data = file.readall()
    except OSError as error:
        return CaptionProblem(path, None, f"cannot be read ({error.strerror or error}).", fatal=True)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return CaptionProblem(path, None, "is UTF-16. Save it as UTF-8.", fatal=True)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the decoder counts from behind it.
        position = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, position) + 1
        message = (
            f"is not UTF-8: byte 0x{data[position]:02x} at position {position}. "
            "Save it as UTF-8 (in Excel: CSV UTF-8; in Notepad: encoding UTF-8)."
        )
        return CaptionProblem(path, line, message, fatal=True)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        return CaptionProblem(path, line, "holds a NUL byte: the file is damaged, or not UTF-8 text.", fatal=True)
    return text


def read_rows(path: Path, problems: list[CaptionProblem], root: Path | None = None) -> list[Row]:
    """All usable rows of a metadata file, in order; what is wrong with the others is appended to ``problems``.

    root: absolute paths of files in this folder are made relative to it.
    """
    text = read_text(path)
    if isinstance(text, CaptionProblem):
        problems.append(text)
        return []
    kind = path.suffix.casefold()
    if kind == ".csv":
        rows = _csv_rows(path, text, problems)
    elif kind == ".jsonl":
        rows = _jsonl_rows(path, text, problems)
    else:
        problems.append(CaptionProblem(path, None, "is neither a .csv nor a .jsonl file.", fatal=True))
        return []
    return list(_usable(path, rows if root is None else _from(root, rows), problems))


def path_problem(filename: str) -> str | None:
    """Why a row must not name its picture {0} so, or None: only paths inside the data folder are followed."""
    if filename.startswith(("/", "\\", "~")) or _DRIVE.match(filename):
        return "{0} is an absolute path; pictures are named relative to the data folder; the row is left out."
    if ".." in filename.replace("\\", "/").split("/"):
        return "{0} leads out of the folder with '..'; the row is left out."
    return None


def _from(root: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, with names relative to ``root`` where they are absolute paths inside of it."""
    starts = {os.path.join(start, "") for start in (os.path.abspath(root), os.path.realpath(root))}
    for row in rows:
        inside = [start for start in starts if os.path.normcase(row.filename).startswith(os.path.normcase(start))]
        yield Row(row.line, row.filename[len(inside[0]) :], row.caption) if inside else row


def _usable(path: Path, rows: Iterator[Row], problems: list[CaptionProblem]) -> Iterator[Row]:
    for row in rows:
        shown = ascii(row.filename)[1:-1] if not row.filename.isprintable() else row.filename
        if not row.filename:
            problem = "names no picture; the row is left out."
        elif has_half_characters(row.filename) or "\0" in row.filename:
            problem = f"{shown} is no file name; the row is left out."
        elif reason := path_problem(row.filename):
            problem = reason.format(shown)
        elif not row.caption:
            problem = f"{shown} has no caption; the row is left out."
        elif has_half_characters(row.caption) or "\0" in row.caption:
            problem = f"the caption of {shown} is not valid Unicode text; the row is left out."
        else:
            yield row
            continue
        empty = bool(row.filename) and not row.caption
        problems.append(CaptionProblem(path, row.line, problem, empty=empty))


def _csv_rows(path: Path, text: str, problems: list[CaptionProblem]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=csv_delimiter(text), strict=True)
    columns: tuple[int, int] | None = None
    width = 2
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                found = find_columns(cells)
                if found is None:
                    message = (
                        f"the header {', '.join(cells)!r} needs a column for the picture "
                        f"({', '.join(FILENAME_COLUMNS)}) and one for the caption ({', '.join(CAPTION_COLUMNS)})."
                    )
                    problems.append(CaptionProblem(path, start, message, fatal=True))
                    return
                columns, is_header = found
                if is_header:
                    width = len(cells)
                    continue
            yield from _csv_row(path, start, cells, columns, width, problems)
    except csv.Error as error:
        message = f"is not valid CSV ({error}); a quoted text must end with a quote, and quotes in it are doubled."
        problems.append(CaptionProblem(path, line, message, fatal=True))


def _csv_row(
    path: Path,
    line: int,
    cells: list[str],
    columns: tuple[int, int],
    width: int,
    problems: list[CaptionProblem],
) -> Iterator[Row]:
    filename_column, caption_column = columns
    if len(cells) <= max(columns):
        message = f"has {len(cells)} of {max(width, 2)} fields; the row is left out."
        problems.append(CaptionProblem(path, line, message))
        return
    caption = cells[caption_column]
    if len(cells) > width:
        if caption_column == width - 1:
            # The usual slip: a caption with commas and without quotes. Nothing of it is lost.
            caption = ",".join(cells[caption_column:])
            message = (
                f"has {len(cells)} fields instead of {width}; read as one caption. Put captions with commas in quotes."
            )
        else:
            message = f"has {len(cells)} fields instead of {width}; what is too much is ignored."
        problems.append(CaptionProblem(path, line, message))
    quoted = caption.strip()
    if caption.startswith(" ") and len(quoted) > 1 and quoted[0] == quoted[-1] == '"':
        # A space before the quote: to CSV the quotes are then part of the text, which nobody means.
        caption = quoted[1:-1].replace('""', '"')
    yield Row(line, cells[filename_column].strip(), caption.strip())


def find_columns(cells: list[str]) -> tuple[tuple[int, int], bool] | None:
    """((picture's, caption's) column, whether this is a header), read from a CSV's first row with text.

    None for a header that lacks one of them.
    """
    header = [cell.strip().casefold() for cell in cells]
    names = set(header)
    if not names & {*FILENAME_COLUMNS, *CAPTION_COLUMNS}:
        return (0, 1), False
    if names & set(FILENAME_COLUMNS) and names & set(CAPTION_COLUMNS):
        return (_first(header, FILENAME_COLUMNS), _first(header, CAPTION_COLUMNS)), True
    return None


def _first(header: list[str], names: tuple[str, ...]) -> int:
    return next(header.index(name) for name in names if name in header)


def csv_delimiter(text: str) -> str:
    """What parts the cells of a CSV: a comma, or what its header shows."""
    # Excel writes semicolons in half of Europe; only a header that is otherwise unknown makes us believe it.
    first = text.lstrip().split("\n", 1)[0].casefold()
    for delimiter in (";", "\t"):
        cells = {cell.strip().strip('"') for cell in first.split(delimiter)}
        if cells & set(FILENAME_COLUMNS) and cells & set(CAPTION_COLUMNS):
            return delimiter
    return ","


def _jsonl_rows(path: Path, text: str, problems: list[CaptionProblem]) -> Iterator[Row]:
    for line, source in enumerate(text.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
            problems.append(CaptionProblem(path, line, f"is not valid JSON ({reason}).", fatal=True))
            continue
        if not isinstance(record, dict):
            message = 'is not an object such as {"filename": "a.png", "prompt": "…"}.'
            problems.append(CaptionProblem(path, line, message, fatal=True))
            continue
        fields = {str(name).strip().casefold(): value for name, value in record.items()}
        values = []
        for names in (FILENAME_COLUMNS, CAPTION_COLUMNS):
            value = next((fields[name] for name in names if fields.get(name) is not None), "")
            if not isinstance(value, str):
                problems.append(CaptionProblem(path, line, f"{names[0]} is not a text; the row is left out."))
                break
            values.append(value.strip())
        if len(values) == 2:
            yield Row(line, *values)
