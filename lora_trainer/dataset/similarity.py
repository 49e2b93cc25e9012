"""Which pictures of a set are the same: by their bytes, or nearly so by a perceptual hash and a thumbnail.

The hash alone mistakes flat drawings for each other (two small stars at different places differ in 2 of 64 bits) and
is unsteady on even backgrounds, so the thumbnails have the last word. Measured on photographs: saved again at another
size the thumbnails differ by 0.1–2 grey levels in the mean, cropped by 2 % a side by 4–11, different photographs of one
subject by 22 or more, different flat drawings by 4 or more with single pixels that differ by much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_trainer.dataset.inspection import Picture
from lora_trainer.dataset.layouts import Layouts
from lora_trainer.dataset.near import by_second, pairs_above, stacked

DUPLICATE_BITS = 4
SIMILAR_BITS = 8
_SAME_MEAN, _SAME_PEAK = 3.0, 25.0  # grey levels of the thumbnails: mean, and 99th percentile of the differences
_SIMILAR_MEAN = 12.0
_UNSTEADY_HASH_MEAN = 1.0  # so alike that the hash does not matter
_PIXELS, _QUARTERS = 8 * 8 * 3, 2 * 2 * 3
_AT_ONCE = 1 << 16

_BITS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Pair:
    """``second`` repeats ``first`` (indices, first < second). kind: "duplicate" (same bytes), "near-duplicate",
    "changed-copy" (brighter or darker, mirrored, cropped, turned or grey) or "similar"."""

    first: int
    second: int
    kind: str


def find_pairs(pictures: Sequence[Picture]) -> list[Pair]:
    """For every picture that repeats an earlier one, that pair, of several the closest."""
    if not pictures:
        return []
    hashes = np.stack([picture.phash for picture in pictures])
    layouts = Layouts(pictures)
    seen: dict[str, int] = {}
    pairs = []
    for (second, alike), likely, turned in zip(alike_earlier(pictures), layouts.likely(), layouts.turned()):
        picture = pictures[second]
        if (first := seen.setdefault(picture.digest, second)) != second:
            pairs.append(Pair(first, second, "duplicate"))
            continue
        best: tuple[float, Pair] | None = None
        for first in map(int, alike):
            both_flat = picture.is_flat and pictures[first].is_flat
            difference = np.abs(pictures[first].thumbnail.astype(np.int16) - picture.thumbnail)
            kind = _kind(int(_BITS[hashes[first] ^ hashes[second]].sum()), difference, both_flat)
            mean = float(difference.mean())
            if kind and (best is None or mean < best[0]):
                best = mean, Pair(first, second, kind)
        if best is None or best[1].kind == "similar":
            copied = layouts.changed_copy(second, likely)
            copied = layouts.turned_copy(second, turned) if copied is None else copied
            best = best if copied is None else (0.0, Pair(copied, second, "changed-copy"))
        if best:
            pairs.append(best[1])
    return pairs


def alike_earlier(pictures: Sequence[Picture]) -> Iterator[tuple[int, np.ndarray]]:
    """Each picture with the earlier ones whose hash is near its own, or whose pixels are nearly the same."""
    hashes = np.stack([picture.phash for picture in pictures])
    signs = np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1  # their product: 64 - 2 × the bits that differ
    coarse = stacked(pictures, lambda some: some.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)), "thumbnail")
    coarse = coarse.reshape(-1, _PIXELS).astype(np.float32)
    # Where all pixels differ by less than _UNSTEADY_HASH_MEAN in the mean, so do the means of quarters; summed up they
    # are at least as long as the vector of them, whose length is one product.
    quarters = coarse.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4)).reshape(-1, _QUARTERS) - 128
    length, one = (quarters**2).sum(axis=1, keepdims=True), np.ones((len(quarters), 1), np.float32)
    left, right = np.hstack([quarters, length, one]), np.hstack([2 * quarters, -one, -length])
    apart = (_QUARTERS * _UNSTEADY_HASH_MEAN) ** 2 + 1  # and rounding
    near_hashes = pairs_above(signs, signs, 64 - 2 * SIMILAR_BITS - 0.5)
    for (block, second, first), (_, also, other) in zip(near_hashes, pairs_above(left, right, -apart)):
        same = np.empty(len(also), bool)
        for start in range(0, len(also), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            same[part] = np.abs(coarse[also[part]] - coarse[other[part]]).mean(axis=1) < _UNSTEADY_HASH_MEAN
        found = np.unique(np.stack([np.append(second, also[same]), np.append(first, other[same])]), axis=1)
        yield from zip(range(block.start, block.stop), by_second(block, *found))


def _kind(bits: int, difference: np.ndarray, both_flat: bool) -> str | None:
    mean = float(difference.mean())
    if (
        (bits <= DUPLICATE_BITS or mean < _UNSTEADY_HASH_MEAN)
        and mean <= _SAME_MEAN
        and float(np.percentile(difference, 99)) <= _SAME_PEAK
    ):
        return "near-duplicate"
    return "similar" if bits <= SIMILAR_BITS and mean <= _SIMILAR_MEAN and not both_flat else None
