"""The points of a job's curve, read from its metrics.jsonl: all of them once, then only what is new."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.curves import thinned

MAX_POINTS = 1000
"""More points than a curve has pixels are thinned out."""

_MAX_BYTES = 64 << 20  # of one read; what is beyond comes with the next


@dataclass(frozen=True)
class Points:
    """points: one mapping per optimizer step, as the run wrote it (step, epoch, loss, lr, …), None for what is not
    finite; and one with ``kind`` for each measurement on held-out pictures (step, validation, training, drift). offset:
    where the next read begins. complete: whether the points before them are still valid; False says that the curve
    starts anew with these.
    """

    points: list[dict[str, Any]]
    offset: int
    complete: bool


def has_grown(path: Path, offset: int) -> bool:
    """Whether there is more to read than what ends at byte ``offset``: a whole line, that is, for a full disk or a
    crash may leave half of one for good."""
    try:
        if os.stat(path).st_size == offset:
            return False
    except OSError:
        return offset != 0
    points = read_points(path, offset)
    return points.offset != offset or not points.complete


def read_points(path: Path, offset: int = 0, limit: int = MAX_POINTS) -> Points:
    """Whole lines after byte ``offset``, at most ``limit`` points of steps (see ``curves.thinned``).

    A resumed run cuts the file back to the step it goes on from: then everything is read again.
    """
    try:
        with open(path, "rb") as handle:
            length = os.fstat(handle.fileno()).st_size
            fresh = 0 < offset <= length
            start = offset if fresh else 0
            handle.seek(max(0, start - 1))
            if start and handle.read(1) != b"\n":
                handle.seek(0)
                start, fresh = 0, False
            data = handle.read(_MAX_BYTES)
    except OSError:
        return Points([], 0, offset == 0)
    end = data.rfind(b"\n") + 1
    points = [point for line in data[:end].splitlines() if (point := _parse(line)) is not None]
    return Points(list(thinned(points, limit)), start + end, fresh or offset == 0)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None  # a line that a crash cut off
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return {key: None if _is_endless(value) else value for key, value in values.items()}


def _is_endless(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
