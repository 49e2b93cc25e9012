"""One look at a picture: everything that the checks want to know of it, from a single decoding at reduced size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_trainer.dataset.images import check_size, exif_orientation, flatten, reading, resize, rotate, to_srgb
from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit

SIDE = 512
"""Length in pixels of the shorter side at which sharpness is measured; smaller pictures are not enlarged."""

_HASH_SIDE = 32
_TILES = 4
_FLAT_STEP = 0.5  # a Laplacian below this, in grey levels, is a flat area
_DEEP_MODES = ("I", "F")

_frequencies = np.arange(_HASH_SIDE)
_DCT = np.cos(np.pi * (_frequencies[None] + 0.5) * _frequencies[:, None] / _HASH_SIDE)
"""DCT-II of 32 values, rows by frequency, without the scale factors that a comparison with the median ignores."""


@dataclass(frozen=True)
class Picture:
    """What one decoding found.

    size: (width, height) in pixels after EXIF rotation and the editor's changes; original_size: without the latter.
    digest: SHA-256 of the file, hexadecimal.
    mode: Pillow's mode as stored; orientation: EXIF 1…8; deep: more than 8 bits per channel; transparent: alpha that
        is not opaque everywhere; animated: more than one frame.
    sharpness: variance of the Laplacian where the picture is not flat; sharpest: the largest variance of the
        Laplacian in 4 × 4 tiles, which a picture with a blurred background still has on its subject.
    steepness: the largest Laplacian as a share of the range of grey levels, above 1 where a drawing has clean edges.
    flatness: share of pixels in flat areas, near 1 for drawings of few colors.
    levels: grey levels (0…255) below which 0.5, 5 and 95 % of the pixels lie.
    phash: 64-bit perceptual hash as 8 bytes; thumbnail: (32, 32, 3) uint8, sRGB; larger: the same with 64 × 64 pixels.
    """

    size: tuple[int, int]
    original_size: tuple[int, int]
    digest: str
    mode: str
    orientation: int
    deep: bool
    transparent: bool
    animated: bool
    sharpness: float
    sharpest: float
    steepness: float
    flatness: float
    levels: tuple[float, float, float]
    phash: np.ndarray
    thumbnail: np.ndarray
    larger: np.ndarray

    @property
    def is_flat(self) -> bool:
        """Whether it is a drawing of few colors rather than a photograph."""
        return self.flatness > 0.8


def inspect(path: Path, edit: PictureEdit = UNTOUCHED) -> Picture:
    """Decode a picture once and measure it, turned and cropped as ``edit`` says.

    Raises:
        UserError: it is damaged, too small, too long or too large to train on; the message names the file.
    """
    with reading(path) as (image, data):
        size, mode = image.size, image.mode
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # MPO: a photo's other views
        drafted = image.format in ("JPEG", "MPO") and image.draft(None, (SIDE, SIDE)) is not None
        image.load()
        if not drafted:
            size = image.size
        orientation = exif_orientation(image)
        if orientation >= 5:
            size = size[1], size[0]
        check_size(path, edit.size(size))
        colors = edit.apply(to_srgb(rotate(image), image.format))
    transparent = colors.mode == "RGBA"
    small = flatten(colors)
    scale = SIDE / min(small.size)
    if scale < 1:
        small = resize(small, (max(SIDE, round(small.width * scale)), max(SIDE, round(small.height * scale))))
    grey_image = small.convert("L")
    grey = np.asarray(grey_image, dtype=np.float32)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    flatness = float((np.abs(laplacian) < _FLAT_STEP).mean())
    paper, low, high = _levels(grey_image, (0.5, 5, 95))
    return Picture(
        size=edit.size(size),
        original_size=size,
        digest=hashlib.sha256(data).hexdigest(),
        mode=mode,
        orientation=orientation,
        deep=mode in _DEEP_MODES or mode.startswith("I;16"),
        transparent=transparent,
        animated=animated,
        sharpness=float(laplacian.var()) / max(1 - flatness, 0.01),
        sharpest=_largest_tile_variance(laplacian),
        steepness=float(np.abs(laplacian).max()) / max(float(np.ptp(grey)), 1.0),
        flatness=flatness,
        levels=(paper, low, high),
        phash=_perceptual_hash(grey_image),
        thumbnail=np.asarray(small.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BOX), dtype=np.uint8),
        larger=np.asarray(small.resize((2 * _HASH_SIDE, 2 * _HASH_SIDE), Image.Resampling.BOX), dtype=np.uint8),
    )


def _levels(grey: Image.Image, shares: Sequence[float]) -> list[float]:
    """The grey levels below which these shares of the pixels lie, in percent, as ``np.percentile`` has them."""
    up_to = np.cumsum(grey.histogram())
    places = np.asarray(shares) / 100 * (up_to[-1] - 1)
    below = np.floor(places).astype(np.int64)
    lower, upper = np.searchsorted(up_to, (below, np.minimum(below + 1, up_to[-1] - 1)), side="right")
    return (lower + (places - below) * (upper - lower)).tolist()


def _largest_tile_variance(values: np.ndarray) -> float:
    """The values are whole numbers, so the sums are exact. Tiles are those of ``np.array_split``."""
    starts = [_starts(length) for length in values.shape]
    sums = (np.add.reduceat(np.add.reduceat(one, starts[0], axis=0), starts[1], axis=1)
            for one in (values.astype(np.float64), np.square(values, dtype=np.float64)))  # fmt: skip
    total, squares = sums
    sizes = np.outer(*(np.diff([*start, length]) for start, length in zip(starts, values.shape)))
    return float((squares / sizes - (total / sizes) ** 2).max())


def _starts(length: int) -> list[int]:
    size, longer = divmod(length, _TILES)
    return [number * size + min(number, longer) for number in range(_TILES)]


def _perceptual_hash(grey: Image.Image) -> np.ndarray:
    """The 8 × 8 lowest frequencies of the 32 × 32 picture, each above their median or not: 8 bytes (pHash)."""
    values = np.asarray(grey.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BOX), dtype=np.float64)
    lowest = (_DCT @ values @ _DCT.T)[:8, :8].ravel()
    return np.packbits(lowest > np.median(lowest[1:]))
