"""What a picture shows, judged without any learned model: shape, color and background.

The foreground is what differs from the border's color. It is moved to its centroid, brought to unit area, and compared
with every shape's outline over all rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from lora_trainer.demo import shapes

CANVAS = 48
"""Side of the raster on which outlines are compared."""
AREA_SHARE = 0.2
"""Share of that raster that every outline covers after normalization."""
ROTATIONS = tuple(range(-45, 180, 5))
STAR_WAISTS = (0.65, 0.8, 1.0, 1.15)
CROSS_ARMS = (0.65, 0.8, 1.0, 1.15)
"""Inner corners of a star and half width of a cross's arms, as multiples of the drawn ones."""
MIN_AREA = 0.01
"""Share of the picture below which nothing is taken for a shape."""
BORDER = 0.05


@dataclass(frozen=True)
class Verdict:
    """What was seen. `overlap` is each shape's best intersection over union (soft, 0…1)."""

    shape: str | None
    color: str | None
    background: str
    overlap: dict[str, float]


def nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Name of the palette's color nearest to `rgb` (0…255)."""
    return min(palette, key=lambda name: math.dist(palette[name], rgb))


def score(picture: Image.Image, names: Sequence[str] = shapes.SHAPES) -> Verdict:
    """Judge one RGB picture of one shape on a plain background. `shape` is None where nothing stands out.

    names: the shapes that it may be, of `shapes.OUTLINES`.
    """
    pixels = np.asarray(picture.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR), np.float64)
    edge = max(1, round(BORDER * len(pixels)))
    frame = np.ones(pixels.shape[:2], bool)
    frame[edge:-edge, edge:-edge] = False
    ground = np.median(pixels[frame], axis=0)
    background = nearest(ground, shapes.BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    strongest = np.quantile(distance, 0.99)
    if strongest < shapes.MIN_CONTRAST / 3:
        return Verdict(None, None, background, {})
    core = distance > 0.7 * strongest
    paint = np.median(pixels[core], axis=0)
    # Share of the way from background to paint: soft coverage, so that blurred edges cost no accuracy.
    way = paint - ground
    cover = np.clip((pixels - ground) @ way / (way @ way), 0, 1)
    cover[cover < 0.25] = 0
    color = nearest(paint, shapes.COLORS)
    if cover.mean() < MIN_AREA:
        return Verdict(None, color, background, {})
    raster = _normalized(cover)
    overlap = {name: _best_overlap(raster, templates) for name, templates in _templates(tuple(names)).items()}
    return Verdict(max(overlap, key=overlap.__getitem__), color, background, overlap)


def _normalized(cover: np.ndarray, angle: float = 0.0) -> np.ndarray:
    """The coverage [H, W] turned by `angle` degrees, centered, at unit area, on the small raster."""
    rows, columns = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    mass = cover.sum()
    cy, cx = (rows * cover).sum() / mass, (columns * cover).sum() / mass
    scale = math.sqrt(mass / (AREA_SHARE * CANVAS**2))
    cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    half = CANVAS / 2
    matrix = (cos, -sin, cx - half * (cos - sin), sin, cos, cy - half * (sin + cos))
    source = Image.fromarray((cover * 255).astype(np.uint8))
    turned = source.transform((CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned, np.float32) / 255


def _best_overlap(raster: np.ndarray, templates: np.ndarray) -> float:
    both = np.minimum(raster, templates).sum(axis=(1, 2))
    either = np.maximum(raster, templates).sum(axis=(1, 2))
    return float((both / either).max())


@cache
def _templates(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """For each shape its normalized outlines, thin and stout, in every rotation: [R, CANVAS, CANVAS]."""
    made = {}
    for name in names:
        rasters = []
        for outline in _variants(name):
            mask = shapes.draw_outline(outline, hole=shapes.RING_HOLE if name == "ring" else 0.0)
            # As blurred as eightfold latents leave it.
            cover = np.asarray(mask.reduce(8).resize((128, 128), Image.Resampling.BILINEAR), np.float64) / 255
            rasters += [_normalized(cover, angle) for angle in ROTATIONS]
        made[name] = np.stack(rasters)
    return made


def _variants(name: str) -> list[list[tuple[float, float]]]:
    """The shape's outline; for stars and crosses also those with thinner and stouter arms, which are no less theirs."""
    outline = shapes.OUTLINES[name]
    if name == "star":
        return [[(x * f, y * f) if i % 2 else (x, y) for i, (x, y) in enumerate(outline)] for f in STAR_WAISTS]
    if name == "cross":
        arm = min(abs(x) for x, _ in outline)

        def stretched(v: float, f: float) -> float:
            return math.copysign(arm * f, v) if abs(v) == arm else v

        return [[(stretched(x, f), stretched(y, f)) for x, y in outline] for f in CROSS_ARMS]
    return [outline]
