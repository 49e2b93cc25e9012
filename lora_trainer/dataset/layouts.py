"""Changed copies of a picture: what was brightened or darkened, mirrored, cropped, turned or made grey.

Two pictures are compared by the correlation of their pixels, all channels together, so that a common change of
brightness or contrast does not count and another color does, unless one of them is grey. The candidates come from
8 × 8 pixels; each is then cropped and turned a little and compared at 32 × 32. Measured on 25 made pictures with the
statistics of photographs: copies reach 0.98, different pictures stay below 0.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_trainer.dataset.alignment import SIDE, agreement, lightness, normalized
from lora_trainer.dataset.inspection import Picture
from lora_trainer.dataset.near import by_second, pairs_above, reduced, stacked

_CANDIDATE = 0.75  # correlation at 8 × 8 pixels
_COPY, _COPY_OF_A_DRAWING = 0.95, 0.9995
_MOST_CANDIDATES = 12
_MOST_TURNED = 4  # each is aligned, which takes milliseconds
_AT_ONCE = 1 << 16
_TURNED = 0.85  # correlation of the lightness at 8 × 8 pixels
_ORIENTATIONS = 8  # quarter turns, then the same of the mirror image
_SAME_COLOR = 3.0  # grey levels between the channels, in the mean


class Layouts:
    """The pictures of a set, each as it is and mirrored, at 8 × 8 pixels."""

    def __init__(self, pictures: Sequence[Picture]):
        self._pictures = pictures
        coarse = stacked(
            pictures,
            lambda some: some.astype(np.float32).reshape(-1, 8, SIDE // 8, 8, SIDE // 8, 3).mean(axis=(2, 4)),
            "larger",
        )
        self._light = normalized(lightness(coarse).reshape(-1, 64))
        self._grey = np.ptp(coarse, axis=-1).mean(axis=(1, 2)) < _SAME_COLOR
        self._flat = np.array([picture.is_flat for picture in pictures])
        self._plain = normalized(coarse.reshape(-1, 192))
        self._mirrored = normalized(coarse[:, :, ::-1].reshape(-1, 192))

    def likely(self) -> Iterator[np.ndarray]:
        """Of each picture the earlier ones that it may be a changed copy of, the likeliest first."""
        # The mean of a picture and its mirror image, and half of their difference: mirrored, that changes its sign.
        even, odd = (reduced((self._plain + sign * self._mirrored) / 2) for sign in (1, -1))
        rows = np.hstack([even, odd])
        mirrored = rows * np.repeat([1, -1, 1], [even.shape[1], odd.shape[1] - 1, 1]).astype(np.float32)
        for (block, second, first), (_, also, other) in zip(
            pairs_above(rows, rows, _CANDIDATE), pairs_above(rows, mirrored, _CANDIDATE)
        ):
            pairs = np.unique(np.stack([np.append(second, also), np.append(first, other)]), axis=1)
            values = np.concatenate([self._likeness(*some) for some in _parts(pairs)])
            (second, first), values = pairs[:, values > _CANDIDATE], values[values > _CANDIDATE]
            order = np.lexsort((-values, second))
            yield from (some[:_MOST_CANDIDATES] for some in by_second(block, second[order], first[order]))

    def _likeness(self, second: np.ndarray, first: np.ndarray) -> np.ndarray:
        return np.maximum(*self._correlations(second, first))

    def _correlations(self, second: Any, first: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of two pictures, and of the second with the first one's mirror image."""
        wanted = self._plain[second]
        return (self._plain[first] * wanted).sum(axis=-1), (self._mirrored[first] * wanted).sum(axis=-1)

    def changed_copy(self, second: int, likely: np.ndarray) -> int | None:
        """The one of ``likely`` that this picture is a changed copy of, if any; of several the closest."""
        best: tuple[float, int] | None = None
        for first in map(int, likely):
            drawings = self._flat[first] and self._flat[second]
            enough = _COPY_OF_A_DRAWING if drawings else _COPY
            both = zip(self._correlations(second, first), (False, True))
            for mirror in [mirror for value, mirror in both if value > _CANDIDATE]:
                larger = self._pictures[first].larger[:, ::-1] if mirror else self._pictures[first].larger
                value = agreement(larger, self._pictures[second].larger, enough, search=not drawings)
                if value >= enough and (best is None or value > best[0]):
                    best = value, first
        return best and best[1]

    def turned(self) -> Iterator[list[tuple[int, int]]]:
        """Of each picture the earlier ones that it may be a copy of in another orientation, or that it or they may be
        a grey copy of, the likeliest first: (picture, orientation). Drawings are not turned: an arrow up is another."""
        count = len(self._light)
        light = self._light.reshape(-1, 8, 8)
        oriented = [_oriented(light, number).reshape(-1, 64) for number in range(_ORIENTATIONS)]
        rows = [reduced(np.concatenate([self._light, other])) for other in oriented]
        for found in zip(*(pairs_above(both[:count], both[count:], _TURNED) for both in rows)):
            block, parts = found[0][0], []
            for number, (_, second, first) in enumerate(found):
                wanted = ~(self._flat[second] & self._flat[first])
                if number in (0, _ORIENTATIONS // 2):  # what ``likely`` finds where the colors are the same
                    wanted &= self._grey[second] != self._grey[first]
                second, first = second[wanted], first[wanted]
                values = np.concatenate(
                    [(self._light[s] * oriented[number][f]).sum(axis=1) for s, f in _parts(np.stack([second, first]))]
                )
                parts.append(np.stack([second, first, np.full(len(first), number), values])[:, values > _TURNED])
            second, first, number, values = np.concatenate(parts, axis=1)
            order = np.lexsort((-values, second))
            pairs = np.stack([first, number], axis=1).astype(int)[order]
            for some in np.split(pairs, np.searchsorted(second[order], range(block.start + 1, block.stop))):
                yield [(int(first), int(number)) for first, number in some[:_MOST_TURNED]]

    def turned_copy(self, second: int, likely: Sequence[tuple[int, int]]) -> int | None:
        """The first of ``likely`` that this picture is a copy of, turned by quarters or made grey, if any."""
        for first, number in likely:
            one, other = _oriented(self._pictures[first].larger, number, 0), self._pictures[second].larger
            if self._grey[first] != self._grey[second]:
                one, other = _without_color(one), _without_color(other)
            if agreement(one, other, _COPY) >= _COPY:
                return first
        return None


def _without_color(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(lightness(pixels)[..., None], 3, axis=-1).astype(np.uint8)


def _oriented(pixels: np.ndarray, number: int, axis: int = 1) -> np.ndarray:
    """Pictures, whose rows are at ``axis``, turned by ``number`` quarters; from 4 on of the mirror image."""
    pixels = np.flip(pixels, axis + 1) if number >= _ORIENTATIONS // 2 else pixels
    return np.rot90(pixels, number % 4, axes=(axis, axis + 1))


def _parts(pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (2, N), some at a time."""
    for start in range(0, max(pairs.shape[1], 1), _AT_ONCE):
        yield pairs[:, start : start + _AT_ONCE]
