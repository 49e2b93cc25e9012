"""Curves of more steps than a picture has pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_AVERAGED = ("loss", "grad_norm", "seconds")


def thinned(lines: Sequence[dict[str, Any]], limit: int) -> Sequence[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` with at most ``limit`` steps, evenly chosen, and all measurements, which are few.

    The first and the last step stay. Each one that stays has the means of the steps since the one before it: what
    trembles is thinned without an accident of which steps are looked at.
    """
    steps = [index for index, line in enumerate(lines) if "kind" not in line]
    if len(steps) <= limit:
        return lines
    ends = [round(number * (len(steps) - 1) / (limit - 1)) for number in range(limit)]
    kept = {}
    for before, end in zip([-1, *ends], ends):
        group = [lines[steps[place]] for place in range(before + 1, end + 1)]
        kept[steps[end]] = {**group[-1], **{name: _mean(group, name) for name in _AVERAGED if name in group[-1]}}
    return [kept.get(index, line) for index, line in enumerate(lines) if index in kept or "kind" in line]


def _mean(group: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in group if isinstance(line.get(name), (int, float))]
    return sum(values) / len(values) if values else None
