"""Pictures that are shown smaller than their bucket, at a random place in it."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from lora_trainer.dataset.samples import Place, Size


def draw_place(bucket: Size, smallest: float, rng: random.Random) -> Place:
    """smallest: of the factors, which are uniform up to 1."""
    factor = rng.uniform(smallest, 1)
    width, height = (max(1, round(side * factor)) for side in bucket)
    return (
        int(rng.random() * (bucket[0] - width + 1)),
        int(rng.random() * (bucket[1] - height + 1)),
        width,
        height,
    )


def bordered(image: Image.Image, place: Place, bucket: Size) -> Image.Image:
    """A picture of the size of ``place`` there in its bucket; its borders go on around it."""
    left, top, width, height = place
    around = [(top, bucket[1] - top - height), (left, bucket[0] - left - width), (0, 0)]
    pixels = np.asarray(image)
    return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))
