"""Changing captions inside a metadata file: every row, column and line that is not changed stays byte for byte."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_trainer.dataset.metadata import CAPTION_COLUMNS, FILENAME_COLUMNS, csv_delimiter, find_columns

Change = Callable[[int, str, str], "str | None"]
"""(line, file name, caption) of a row -> its new caption, or None to leave the row as it is."""


def rewrite_csv(text: str, change: Change, added: Sequence[tuple[str, str]] = ()) -> str:
    """A CSV with other captions in some of its rows, and rows of (file name, caption) behind them.

    ``text`` is a file that ``metadata.read_rows`` reads without a fatal problem; empty makes a new one with a header.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    delimiter = csv_delimiter(text)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    pieces: list[str] = []
    columns: tuple[int, int] | None = None
    width, line = 2, 1
    for cells in reader:
        start, line = line, reader.line_num + 1
        source = "".join(lines[start - 1 : line - 1])
        pieces.append(source)
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns, is_header = find_columns(cells) or ((0, 1), False)
            if is_header:
                width = len(cells)
                continue
        picture, caption = columns
        if len(cells) <= max(columns):
            continue
        last = caption == width - 1  # a caption with commas and without quotes fills all cells that follow
        old = delimiter.join(cells[caption:]) if last else cells[caption]
        new = change(start, cells[picture].strip(), old.strip())
        if new is not None:
            cells[caption : len(cells) if last else caption + 1] = [new]
            pieces[-1] = _csv_row(cells, delimiter, newline)
    if pieces and not pieces[-1].endswith(("\n", "\r")) and added:
        pieces.append(newline)
    picture, caption = columns or (0, 1)
    if columns is None and added and not "".join(pieces).strip():
        pieces.append(_csv_row([FILENAME_COLUMNS[0], CAPTION_COLUMNS[0]], delimiter, newline))
    for name, text in added:
        cells = [""] * max(width, 2)
        cells[picture], cells[caption] = name, text
        pieces.append(_csv_row(cells, delimiter, newline))
    return "".join(pieces)


def rewrite_jsonl(text: str, change: Change, added: Sequence[tuple[str, str]] = ()) -> str:
    """The same for JSON lines."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split("\n")
    names = (FILENAME_COLUMNS[0], CAPTION_COLUMNS[0])
    for number, source in enumerate(lines, start=1):
        if not source.strip():
            continue
        record = json.loads(source)
        picture, caption = _field(record, FILENAME_COLUMNS), _field(record, CAPTION_COLUMNS)
        if picture is None:
            continue
        names = (picture, caption or names[1])
        new = change(number, str(record[picture]).strip(), str(record.get(names[1]) or "").strip())
        if new is not None:
            record[names[1]] = new
            lines[number - 1] = _json_row(record) + ("\r" if source.endswith("\r") else "")
    text = "\n".join(lines)
    if text and not text.endswith("\n") and added:
        text += newline
    return text + "".join(_json_row(dict(zip(names, row))) + newline for row in added)


def render(kind: str, captions: Mapping[str, str]) -> str:
    """A new metadata file of ``kind`` ".csv" or ".jsonl": file name -> caption, in order."""
    return REWRITERS[kind]("", lambda line, name, caption: None, list(captions.items()))


REWRITERS: dict[str, Callable[[str, Change, Sequence[tuple[str, str]]], str]] = {
    ".csv": rewrite_csv,
    ".jsonl": rewrite_jsonl,
}


def _csv_row(cells: Sequence[str], delimiter: str, newline: str) -> str:
    row = io.StringIO()
    # A lone carriage return ends a row for whoever reads it, and is not quoted by itself.
    alone = any("\r" in cell for cell in cells)
    writer = csv.writer(
        row, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL if alone else csv.QUOTE_MINIMAL
    )
    writer.writerow(cells)
    return row.getvalue()


def _json_row(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _field(record: dict[str, Any], names: Sequence[str]) -> str | None:
    """The record's own spelling of the first of these fields that has a value, else of the first that is there."""
    own = {str(name).strip().casefold(): name for name in record}
    present = [own[name] for name in names if name in own]
    return next((name for name in present if record[name] is not None), present[0] if present else None)
