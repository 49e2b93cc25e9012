"""Captioned pictures of one colored shape on a plain background, drawn with Pillow.

The embedded base model learns from the shapes in `KNOWN_SHAPES`; `star` is kept from it, so that a LoRA of stars
can be judged: what it shows afterwards, it was taught. Everything is a function of a seed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KNOWN_SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
NEW_SHAPE = "star"
SHAPES = (*KNOWN_SHAPES, NEW_SHAPE)
COLORS = {
    "red": (220, 30, 35),
    "green": (35, 160, 60),
    "blue": (35, 75, 215),
    "yellow": (250, 220, 30),
    "purple": (130, 40, 165),
    "orange": (250, 130, 25),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "grey": (140, 140, 140),
    "pink": (255, 185, 205),
    "teal": (55, 145, 145),
    "brown": (120, 78, 48),
    "beige": (235, 220, 185),
    "navy": (22, 28, 85),
}
SIZES = {"small": (0.21, 0.26), "big": (0.33, 0.41)}
"""Radius of a shape as a share of the picture's side. Below 0.2 eight-fold latents no longer tell shapes apart."""
MIN_CONTRAST = 90.0
"""Smallest RGB distance between a shape and its background; a pair below it (white on beige) is never drawn."""
MAX_TILT = math.radians(10)
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What one picture shows. Lengths are shares of the picture's side; `tilt` is in radians.

    Captions need only the first four.
    """

    shape: str
    color: str
    background: str
    size: str
    radius: float = 0.35
    center: tuple[float, float] = (0.5, 0.5)
    tilt: float = 0.0


def _regular(corners: int, start: float, radii: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
    turn = 2 * math.pi / corners
    return [
        (radii[i % len(radii)] * math.cos(start + i * turn), radii[i % len(radii)] * math.sin(start + i * turn))
        for i in range(corners)
    ]


_ARM = 0.32
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.95 * x, 0.95 * y) for x, y in _regular(72, 0.0)],
    "ring": [(0.95 * x, 0.95 * y) for x, y in _regular(72, 0.0)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(x, y + 0.2) for x, y in _regular(3, -math.pi / 2, (1.15,))],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "diamond": [(0, -1.15), (0.72, 0), (0, 1.15), (-0.72, 0)],
    "star": _regular(10, -math.pi / 2, (1.2, 0.48)),
}  # fmt: skip
"""Corners of each shape around the origin, y downwards, about one unit in radius."""
RING_HOLE = 0.52
"""Radius of the ring's hole in the same unit."""


def contrasts(color: str, background: str) -> bool:
    """Whether a shape of this color is clearly visible on this background."""
    return math.dist(COLORS[color], BACKGROUNDS[background]) >= MIN_CONTRAST


def color_pairs() -> list[tuple[str, str]]:
    """Every (color, background) that contrasts, in a fixed order."""
    return [(color, ground) for color in COLORS for ground in BACKGROUNDS if contrasts(color, ground)]


def random_scene(
    rng: np.random.Generator,
    shape: str | None = None,
    color: str | None = None,
    background: str | None = None,
    size: str | None = None,
) -> Scene:
    """A scene with every attribute that is not given, and all jitter, drawn from `rng`. The shape lies inside."""
    pairs = [p for p in color_pairs() if color in (None, p[0]) and background in (None, p[1])]
    if color is not None and background is not None:
        pairs = [(color, background)]
    color, background = pairs[rng.integers(len(pairs))]
    shape = shape or KNOWN_SHAPES[rng.integers(len(KNOWN_SHAPES))]
    size = size or tuple(SIZES)[rng.integers(len(SIZES))]
    radius = float(rng.uniform(*SIZES[size]))
    room = max(0.0, 0.5 - 1.2 * radius)
    center = tuple(0.5 + float(d) for d in rng.uniform(-room, room, 2))
    tilt = float(rng.uniform(-MAX_TILT, MAX_TILT))
    return Scene(shape, color, background, size, radius, (center[0], center[1]), tilt)


def draw_mask(scene: Scene, side: int = 128) -> Image.Image:
    """Coverage of the shape as an anti-aliased 8-bit grey picture of `side` × `side` pixels."""
    hole = RING_HOLE if scene.shape == "ring" else 0.0
    return draw_outline(OUTLINES[scene.shape], scene.radius, scene.center, scene.tilt, hole, side)


def draw_outline(
    outline: Sequence[tuple[float, float]],
    radius: float = 0.35,
    center: tuple[float, float] = (0.5, 0.5),
    tilt: float = 0.0,
    hole: float = 0.0,
    side: int = 128,
) -> Image.Image:
    """Coverage of any outline (one unit is `radius`), less a round hole of radius `hole`, as `draw_mask` gives it."""
    big = side * SUPERSAMPLING
    cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius

    def corner(x: float, y: float) -> tuple[float, float]:
        return (center[0] + cos * x - sin * y) * big, (center[1] + sin * x + cos * y) * big

    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon([corner(x, y) for x, y in outline], fill=255)
    if hole:
        pen.polygon([corner(hole * x, hole * y) for x, y in _regular(72, 0.0)], fill=0)
    return mask.reduce(SUPERSAMPLING)


def draw(scene: Scene, side: int = 128) -> Image.Image:
    """The scene as an RGB picture of `side` × `side` pixels."""
    ground = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    ground.paste(COLORS[scene.color], (0, 0, side, side), draw_mask(scene, side))
    return ground


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plain_caption(scene: Scene) -> str:
    """The full caption, "a big red circle on a blue background"."""
    return f"a {scene.size} {scene.color} {scene.shape} on a {scene.background} background"


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of the scene: mostly the full one, otherwise reworded or with something left out."""
    s, ground = scene, f"on a {scene.background} background"
    others = (
        f"a {s.size} {s.color} **{s.shape}** {ground}",
        f"{article(s.color)} {s.shape} {ground}",
        f"{s.size} {s.color} {s.shape}, {s.background} background",
        f"{s.color} {s.shape}, {s.background} background",
        f"a {s.background} background with a {s.size} {s.color} {s.shape}",
        f"a {s.size} {s.shape} {ground}",
        f"{article(s.color)} {s.shape}",
        f"a {s.size} {s.color} {s.shape}",
        f"a picture of {article(s.color)} {s.shape} {ground}",
    )
    return plain_caption(scene) if rng.random() < 0.6 else others[rng.integers(len(others))]


def write_dataset(
    folder: Path, count: int = 20, shape: str = NEW_SHAPE, seed: int = 0, side: int = 128, held_out: int = 4
) -> list[Scene]:
    """Draw `count` pictures of one shape with a `metadata.csv` (`filename,prompt`) into `folder`, which is created.

    Captions mark the subject as structured captions do: "a big orange **star** on a pink background".
    Color pairs take turns, so that a small set covers the palette; every `held_out`-th pair (0: none) is kept
    back: `held_out_pairs` names those, for judging on combinations that the training never showed.
    """
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in color_pairs() if pair not in held_out_pairs(held_out)]
    order: list[tuple[str, str]] = []
    while len(order) < count:
        order += [pairs[i] for i in rng.permutation(len(pairs))]
    folder.mkdir(parents=True, exist_ok=True)
    scenes = []
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("filename", "prompt"))
        for index, (color, background) in enumerate(order[:count]):
            size = tuple(SIZES)[index % len(SIZES)]
            scene = random_scene(rng, shape, color, background, size)
            name = f"{shape}_{index:02d}.png"
            draw(scene, side).save(folder / name)
            rows.writerow((name, plain_caption(scene).replace(shape, f"**{shape}**")))
            scenes.append(scene)
    return scenes


def held_out_pairs(every: int = 4) -> list[tuple[str, str]]:
    """The (color, background) pairs that `write_dataset` leaves out."""
    return color_pairs()[::every] if every else []
