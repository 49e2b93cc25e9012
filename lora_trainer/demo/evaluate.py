"""How often pictures show what their captions asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lora_trainer.demo import shapes
from lora_trainer.demo.score import score


@dataclass(frozen=True)
class Accuracy:
    """Shares (0…1) of `count` pictures that show the asked shape, color and background; `seen` counts the shapes."""

    count: int
    shape: float
    color: float
    background: float
    seen: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = (f"{name} {getattr(self, name):.1%}" for name in ("shape", "color", "background"))
        return f"{', '.join(parts)} of {self.count}"


def prompts(
    count: int, seed: int, names: Sequence[str] = shapes.KNOWN_SHAPES, pairs: Sequence[tuple[str, str]] | None = None
) -> list[shapes.Scene]:
    """Scenes to ask for: shapes and sizes take turns, (color, background) pairs do so in a random order."""
    rng = np.random.default_rng(seed)
    pairs = pairs or shapes.color_pairs()
    order = [pairs[int(i)] for _ in range(count // len(pairs) + 1) for i in rng.permutation(len(pairs))]
    sizes = tuple(shapes.SIZES)
    return [
        shapes.random_scene(rng, names[i % len(names)], *order[i], sizes[i // len(names) % len(sizes)])
        for i in range(count)
    ]


def accuracy(pictures: Sequence[Image.Image], scenes: Sequence[shapes.Scene]) -> Accuracy:
    """Judge each picture against the scene that was asked for."""
    verdicts = [score(picture) for picture in pictures]
    hits = np.array(
        [
            (seen.shape == asked.shape, seen.color == asked.color, seen.background == asked.background)
            for seen, asked in zip(verdicts, scenes, strict=True)
        ]
    )
    shape, color, background = (float(share) for share in hits.mean(axis=0))
    return Accuracy(len(scenes), shape, color, background, dict(Counter(str(v.shape) for v in verdicts)))
