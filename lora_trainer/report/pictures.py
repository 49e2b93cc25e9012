"""Pictures inside the page: scaled down, as data addresses."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

THUMBNAIL, PREVIEW, GRID = 112, 224, 1600
"""Longest sides in pixels."""


def data_address(picture: Path | Image.Image, side: int) -> str | None:
    """The picture with sides of at most ``side``; None where there is none that can be read."""
    try:
        with Image.open(picture) if isinstance(picture, Path) else picture as image:
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
