"""Which pictures of a set are the same: by their bytes, or nearly so by a perceptual hash and a thumbnail.

The hash alone mistakes flat drawings for each other (two small stars at different places differ in 2 of 64 bits) and
is unsteady on even backgrounds, so the thumbnails have the last word. Measured on photographs: saved again at another
size the thumbnails differ by 0.1–2 grey levels in the mean, cropped by 2 % a side by 4–11, different photographs of one
subject by 22 or more, different flat drawings by 4 or more with single pixels that differ by much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_trainer.dataset.inspection import Picture
from lora_trainer.dataset.layouts import Layouts

DUPLICATE_BITS = 4
SIMILAR_BITS = 8
_SAME_MEAN, _SAME_PEAK = 3.0, 25.0  # grey levels of the thumbnails: mean, and 99th percentile of the differences
_SIMILAR_MEAN = 12.0
_UNSTEADY_HASH_MEAN = 1.0  # so alike that the hash does not matter

_BITS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Pair:
    """``second`` repeats ``first`` (indices, first < second). kind: "duplicate" (same bytes), "near-duplicate",
    "changed-copy" (brighter or darker, mirrored, cropped or turned a little) or "similar"."""

    first: int
    second: int
    kind: str


def find_pairs(pictures: Sequence[Picture]) -> list[Pair]:
    """For every picture that repeats an earlier one, that pair, of several the closest."""
    hashes = np.array([picture.phash for picture in pictures], dtype=np.uint8).reshape(-1, 8)
    thumbnails = np.array([picture.thumbnail for picture in pictures], dtype=np.int16).reshape(-1, 32, 32, 3)
    coarse = thumbnails.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(-1, 192).astype(np.float32)
    layouts = Layouts(pictures)
    seen: dict[str, int] = {}
    pairs = []
    for second, picture in enumerate(pictures):
        if (first := seen.setdefault(picture.digest, second)) != second:
            pairs.append(Pair(first, second, "duplicate"))
            continue
        bits = _BITS[hashes[:second] ^ hashes[second]].sum(axis=1, dtype=np.int64)
        alike = np.abs(coarse[:second] - coarse[second]).mean(axis=1) < _UNSTEADY_HASH_MEAN
        best: tuple[float, Pair] | None = None
        for first in map(int, np.flatnonzero((bits <= SIMILAR_BITS) | alike)):
            both_flat = picture.is_flat and pictures[first].is_flat
            difference = np.abs(thumbnails[first] - thumbnails[second])
            kind = _kind(int(bits[first]), difference, both_flat)
            mean = float(difference.mean())
            if kind and (best is None or mean < best[0]):
                best = mean, Pair(first, second, kind)
        if best is None or best[1].kind == "similar":
            copied = layouts.changed_copy(second)
            best = best if copied is None else (0.0, Pair(copied, second, "changed-copy"))
        if best:
            pairs.append(best[1])
    return pairs


def _kind(bits: int, difference: np.ndarray, both_flat: bool) -> str | None:
    mean = float(difference.mean())
    if (
        (bits <= DUPLICATE_BITS or mean < _UNSTEADY_HASH_MEAN)
        and mean <= _SAME_MEAN
        and float(np.percentile(difference, 99)) <= _SAME_PEAK
    ):
        return "near-duplicate"
    return "similar" if bits <= SIMILAR_BITS and mean <= _SIMILAR_MEAN and not both_flat else None
