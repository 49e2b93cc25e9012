"""How well one picture agrees with another that was cropped, moved or turned a little.

Both have 64 × 64 pixels. First some crops and turns around the middle are tried; from the best of them the affine
transform that agrees most is found by Gauss-Newton steps (Lucas and Kanade, 1981), on pixels without their mean and of
length 1, so that brightness and contrast do not count.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 64
_SCALES = (1.0, 0.95, 0.9, 1 / 0.95, 1 / 0.9)
_ANGLES = (0.0, 1.0, -1.0, 2.0, -2.0)  # degrees
_EDGE = 8  # pixels around the middle, which a turned or cropped copy lacks
_INNER = slice(_EDGE, SIDE - _EDGE)
_WORTH_TRYING = 0.4
"""Agreement as they are, below which pictures are told apart without looking further."""
_WORTH_A_SEARCH = 0.6
_STEPS = 8
_FARTHEST = 10.0  # pixels that a corner moves
_LIGHT = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (Rec. 601)

Affine = tuple[float, ...]
"""Pillow's six coefficients: where in the picture a pixel of the result comes from."""


def agreement(first: np.ndarray, second: np.ndarray, enough: float, *, search: bool = True) -> float:
    """The highest correlation of ``second`` with ``first``, cropped and turned a little; ends where it is enough.

    first, second: (64, 64, 3) uint8. search: for any small affine change, not for those around the middle alone.
    """
    image, wanted = Image.fromarray(np.ascontiguousarray(first)), _inner(second)
    best, start = -1.0, _transforms()[0]
    for transform in _transforms():
        if (value := float(_inner(_changed(image, transform)) @ wanted)) > best:
            best, start = value, transform
        if best >= enough or best < _WORTH_TRYING:
            return best
    if not search or best < _WORTH_A_SEARCH:
        return best
    found = _aligned(lightness(first), lightness(second), start)
    return best if found is None else max(best, float(_inner(_changed(image, found)) @ wanted))


def lightness(pixels: np.ndarray) -> np.ndarray:
    """(…, 3) -> (…), float32."""
    return pixels.astype(np.float32) @ _LIGHT


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows without their mean and of length 1; an even picture has none and becomes zeros."""
    centered = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    return centered / np.where(length > 1e-3 * rows.shape[1] ** 0.5, length, np.inf)


def _changed(image: Image.Image, transform: Affine) -> np.ndarray:
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR))


def _inner(pixels: np.ndarray) -> np.ndarray:
    """The middle of a picture, normalized; two by two pixels as one, because the finest detail moves in a turn."""
    middle = pixels[_INNER, _INNER].astype(np.float32)
    side = middle.shape[0] // 2
    return normalized(middle.reshape(side, 2, side, 2, 3).mean(axis=(1, 3)).reshape(1, -1))[0]


@lru_cache(maxsize=1)
def _transforms() -> tuple[Affine, ...]:
    """Turns and crops around the middle, the smallest change first."""
    found = []
    center = (SIDE - 1) / 2
    for angle in _ANGLES:
        for scale in _SCALES:
            cosine, sine = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
            x, y = center - cosine * center - sine * center, center + sine * center - cosine * center
            found.append((abs(angle) + 20 * abs(math.log(scale)), (cosine, sine, x, -sine, cosine, y)))
    return tuple(transform for _, transform in sorted(found))


def _aligned(first: np.ndarray, second: np.ndarray, start: Affine) -> Affine | None:
    """The transform near ``start`` by which ``first`` (64, 64) agrees most with ``second``; None if it leads away."""
    half = [pixels.reshape(SIDE // 2, 2, SIDE // 2, 2).mean(axis=(1, 3)) for pixels in (first, second)]
    image = Image.fromarray(half[0])
    inner = slice(_EDGE // 2, SIDE // 2 - _EDGE // 2)
    y, x = np.mgrid[inner, inner].astype(np.float32) + 0.5
    x, y = x.ravel(), y.ravel()
    wanted = normalized(half[1][inner, inner].reshape(1, -1))[0]
    matrix = np.array([*start[:2], start[2] / 2, *start[3:5], start[5] / 2, 0, 0, 1]).reshape(3, 3)
    corners = np.array([[0, SIDE, 0, SIDE], [0, 0, SIDE, SIDE], [2, 2, 2, 2]]) / 2
    for _ in range(_STEPS):
        now = _changed(image, tuple(matrix[:2].ravel()))
        down, across = (slope[inner, inner].ravel() for slope in np.gradient(now))
        middle = now[inner, inner].ravel()
        length = float(np.linalg.norm(middle - middle.mean())) or 1.0
        slopes = np.stack([across * x, across * y, across, down * x, down * y, down])
        slopes = (slopes - slopes.mean(axis=1, keepdims=True)) / length
        missing = wanted - (middle - middle.mean()) / length
        square = slopes @ slopes.T
        square[np.diag_indices(6)] *= 1 + 1e-3
        try:
            step = np.linalg.solve(square, slopes @ missing)
        except np.linalg.LinAlgError:  # an even picture
            return None
        matrix = matrix @ (np.eye(3) + np.vstack([step.reshape(2, 3), np.zeros(3)]))
        if not np.isfinite(matrix).all() or np.abs((matrix @ corners - corners)[:2]).max() > _FARTHEST / 2:
            return None
        if np.abs(step).max() < 1e-3:
            break
    a, b, c, d, e, f = matrix[:2].ravel()
    return a, b, 2 * c, d, e, 2 * f
