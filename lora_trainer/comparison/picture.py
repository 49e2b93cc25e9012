"""A comparison as one picture with labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lora_trainer.comparison.plan import Plan

MOST_PIXELS = 64_000_000
"""Of the whole picture: cells are made smaller for it."""
LARGEST_CELL = 512
_GAP = 4
_BACKGROUND, _INK, _QUIET, _MISSING = "white", "black", "dimgrey", "gainsboro"
_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc",
    "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf", "LiberationSans-Regular.ttf", "Helvetica.ttc",
)  # fmt: skip
"""Tried in this order: first those with Chinese characters."""


Place = tuple[int, "int | None", "float | None"]
"""Of a cell: prompt, step and weight."""


def labelled(plan: Plan, files: Mapping[Place, Path]) -> Image.Image:
    """The comparison as a table. files: of the pictures that there are; the other cells stay grey."""
    columns, rows = _columns(plan), _rows(plan)
    width, height = _cell_size(files, len(columns), len(plan.prompts) * len(rows))
    size = max(12, min(width, height) // 14)
    font = _font(size)
    line = size + 2 * _GAP
    margin = _text_width(font, max((text for text, _, _ in rows), key=len)) + 3 * _GAP
    band = line + len(rows) * (height + _GAP) + _GAP
    whole = (margin + len(columns) * (width + _GAP), line + len(plan.prompts) * band)
    sheet = Image.new("RGB", whole, _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for column, (text, _, _) in enumerate(columns):
        _write(pen, (margin + column * (width + _GAP), _GAP), text, font, _INK, width)
    for index, prompt in enumerate(plan.prompts):
        top = line + index * band
        _write(pen, (_GAP, top + _GAP // 2), prompt, font, _INK, whole[0] - 2 * _GAP)
        for row, (text, step, weight) in enumerate(rows):
            y = top + line + row * (height + _GAP)
            _write(pen, (_GAP, y), text, font, _QUIET, margin)
            for column, (_, its_step, its_weight) in enumerate(columns):
                place = (margin + column * (width + _GAP), y)
                of_base = (its_step, its_weight) == (None, None)
                cell = (None, None) if of_base else (step or its_step, weight or its_weight)
                file = files.get((index, *cell))
                if file is None:
                    pen.rectangle((*place, place[0] + width - 1, place[1] + height - 1), fill=_MISSING)
                    continue
                with Image.open(file) as picture:
                    small = picture.convert("RGB")
                small.thumbnail((width, height), Image.LANCZOS)
                sheet.paste(small, place)
    return sheet


_Head = tuple[str, "int | None", "float | None"]
"""Of a row or column: what stands there, its step, its weight; without both it is the base model's."""


def _columns(plan: Plan) -> list[_Head]:
    """The base model and the steps; where weights go both ways, these in order, with the base model as 0."""
    if min(plan.weights) > 0:
        return [("base model", None, None), *((f"step {step}", step, None) for step in plan.steps)]
    weights = sorted((*plan.weights, 0.0))
    return [(f"× {one:g}", None, one) if one else ("× 0, base model", None, None) for one in weights]


def _rows(plan: Plan) -> list[_Head]:
    """What the columns do not show: weights or steps."""
    if min(plan.weights) > 0:
        return [(f"× {weight:g}", None, weight) for weight in plan.weights]
    return [(f"step {step}", step, None) for step in plan.steps]


def _cell_size(files: Mapping[Place, Path], columns: int, rows: int) -> tuple[int, int]:
    """Of the largest picture, made smaller where the whole would be too large."""
    sizes = []
    for file in files.values():
        with Image.open(file) as picture:
            sizes.append(picture.size)
    width, height = (max(sides) for sides in zip(*sizes))
    shrunk = min(1.0, LARGEST_CELL / max(width, height), (MOST_PIXELS / (columns * rows * width * height)) ** 0.5)
    return max(1, round(width * shrunk)), max(1, round(height * shrunk))


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has only a small one
        return ImageFont.load_default()


def _text_width(font: Any, text: str) -> int:
    return int(font.getbbox(text)[2])


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Any, ink: str, room: int) -> None:
    """``text`` in one line, cut where it is longer than ``room`` pixels."""
    text = " ".join(text.split())
    if not isinstance(font, ImageFont.FreeTypeFont):  # it knows no other characters, and fails on them
        text = text.replace("×", "x").encode("ascii", "replace").decode("ascii")
    if _text_width(font, text) > room:
        while text and _text_width(font, text + "...") > room:
            text = text[:-1]
        text += "..."
    pen.text(place, text, fill=ink, font=font)
