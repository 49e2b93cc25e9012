"""Small training sets that tests draw themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black", "white", "yellow")


def draw_dataset(
    folder: Path,
    count: int = 4,
    size: Callable[[int], tuple[int, int]] = lambda index: (64, 64),
    caption: Callable[[int], str | None] = lambda index: f"a {COLORS[index % 8]} **disc**, plain background",
) -> Path:
    """``count`` pictures of a disc with their captions in .txt files (none where ``caption`` gives None)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        width, height = size(index)
        picture = Image.new("RGB", (width, height), "grey")
        left = (7 * index) % (width // 2)
        ImageDraw.Draw(picture).ellipse((left, 8, left + width // 2, 8 + height // 2), fill=COLORS[index % 8])
        picture.save(folder / f"disc {index:02}.png")
        if (text := caption(index)) is not None:
            (folder / f"disc {index:02}.txt").write_text(text, encoding="utf-8")
    return folder
