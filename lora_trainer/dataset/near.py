"""Which rows of a table are near each other, without looking at every pair by itself.

All pairs of 100,000 rows are five billion, but one product of two numbers tells of each, in a block of thousands, and a
few columns suffice to rule nearly all pairs out. What is left is looked at exactly by whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lora_trainer.dataset.inspection import Picture

_BLOCK, _ACROSS = 512, 8192
_ROWS = 1024
_LOST = 0.2
"""Share of the rows' length that ``reduced`` leaves out in the mean: with less it has more columns."""


def stacked(pictures: Sequence[Picture], row: Callable[[np.ndarray], np.ndarray], name: str) -> np.ndarray:
    """``row`` of the arrays of this name, (N, …), for a thousand pictures at a time: all at once take gigabytes."""
    parts = [
        row(np.stack([getattr(picture, name) for picture in pictures[start : start + _ROWS]]))
        for start in range(0, len(pictures), _ROWS)
    ]
    return np.concatenate(parts)


def pairs_above(rows: np.ndarray, others: np.ndarray, enough: float) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Of each block of rows in turn: the block, and the pairs (second, first), first < second, for which
    ``rows[second] @ others[first]`` reaches ``enough``; seconds ascend, and so do the firsts of each."""
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(rows)))
        seconds, firsts = [], []
        for across in range(0, block.stop, _ACROSS):
            products = rows[block] @ others[across : min(across + _ACROSS, block.stop)].T
            found = np.flatnonzero(products.ravel() >= enough)
            second, first = np.divmod(found, products.shape[1])
            seconds.append(second + start)
            firsts.append(first + across)
        second, first = np.concatenate(seconds), np.concatenate(firsts)
        earlier = first < second
        second, first = second[earlier], first[earlier]
        order = np.lexsort((first, second))
        yield block, second[order], first[order]


def by_second(block: slice, second: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
    """The firsts of each row of a block."""
    return np.split(first, np.searchsorted(second, range(block.start + 1, block.stop)))


def reduced(rows: np.ndarray) -> np.ndarray:
    """Fewer columns, whose products are nowhere smaller than those of ``rows``: the directions in which the rows differ
    most, and the length of what is left."""
    values, directions = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    left = 1 - np.cumsum(values[::-1]) / max(values.sum(), 1e-12)
    count = int(np.argmax(left < _LOST)) + 1
    kept = rows @ directions[:, ::-1][:, :count].astype(np.float32)
    rest = np.sqrt(np.maximum((rows**2).sum(axis=1) - (kept**2).sum(axis=1), 0))
    return np.column_stack([kept, rest + 1e-3]).astype(np.float32)  # rounding must not lose a pair
