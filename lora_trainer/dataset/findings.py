"""What the checks of a data set tell, and what a person can do about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. ``file``: posix path relative to the data folder, empty for the whole set. An error
    stops a training or spoils what the picture teaches; a warning is worth a look; an info changes nothing."""

    file: str
    kind: str
    severity: Severity
    message: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """images, captions: usable pictures, and those with a caption of their own. buckets: rows of resolution
    (width, height), images, count (visits per epoch), batches. steps_preview: visits and steps of an epoch.
    stops_training: a training on this folder would refuse to start."""

    findings: tuple[Finding, ...]
    images: int
    captions: int
    buckets: tuple[dict[str, Any], ...]
    steps_preview: dict[str, int]
    stops_training: bool

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as ``check --json`` prints them."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "images": self.images,
            "captions": self.captions,
            "buckets": [{**row, "resolution": list(row["resolution"])} for row in self.buckets],
            "steps_preview": dict(self.steps_preview),
            "stops_training": self.stops_training,
        }


def enumerate_some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
