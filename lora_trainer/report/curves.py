"""Curves as SVG, drawn here, so that the page needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_trainer.report.html import Html, element, joined

WIDTH, HEIGHT = 720, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 22
MOST_POINTS = 720
"""More points than the picture has pixels are not drawn."""
_OUTLIERS = 0.02  # so many of the highest values may lie above the picture

Points = Sequence[tuple[int, float]]
"""(step, value), by step."""


@dataclass(frozen=True)
class Line:
    """kind: its class in the style sheet. dots: with a dot at each of its points, which are few."""

    title: str
    kind: str
    points: Points
    dots: bool = False


def chart(title: str, lines: Sequence[Line]) -> Html | None:
    """Lines over the steps in one picture, with a legend where there are several; None without a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.points]
    first, last = min(0, *steps), max(1, *steps)
    low, high = _span(lines)

    def x(step: int) -> float:
        return _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (1 - (min(value, high) - low) / (high - low)) * (HEIGHT - _TOP - _BOTTOM)

    rows = (low, (low + high) / 2, high)
    grid = "".join(f"M{_LEFT} {y(row):.1f}H{WIDTH - _RIGHT}" for row in rows)
    labels = [element("text", number(row), x=_LEFT - 6, y=f"{y(row) + 4:.1f}", text_anchor="end") for row in rows]
    labels += [
        element("text", str(first), x=_LEFT, y=HEIGHT - 5),
        element("text", str(last), x=WIDTH - _RIGHT, y=HEIGHT - 5, text_anchor="end"),
    ]
    drawn = []
    for line in lines:
        places = [(x(step), y(value)) for step, value in line.points]
        path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
        drawn.append(element("path", d=path, class_=f"line {line.kind}"))
        if line.dots or len(places) == 1:
            drawn += [
                element("circle", cx=f"{left:.1f}", cy=f"{top:.1f}", r=3, class_=line.kind) for left, top in places
            ]
    svg = element(
        "svg",
        element("path", d=grid, class_="grid"),
        *drawn,
        *labels,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    legend = [element("span", line.title, class_=f"legend {line.kind}") for line in lines if len(lines) > 1]
    return element("figure", element("figcaption", element("b", title), joined(*legend)), svg)


def average(points: Points) -> list[tuple[int, float]]:
    """Exponential average over about a tenth of what there is, without the bias of its beginning, as on the page."""
    keep = 1 - 1 / max(5, min(100, len(points) / 10))
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:.3g}"


def _span(lines: Sequence[Line]) -> tuple[float, float]:
    """From the lowest value to the highest, without the few highest of lines with many points."""
    low = min(value for line in lines for _, value in line.points)
    highest = []
    for line in lines:
        values = sorted(value for _, value in line.points)
        highest.append(values[math.ceil((len(values) - 1) * (1 - _OUTLIERS))] if not line.dots else values[-1])
    high = max(highest)
    return (low, high) if high > low else (low - abs(low) / 10, low + (abs(low) / 10 or 1))
