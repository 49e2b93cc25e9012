"""What the checks of a data set report, and what a person can do about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

_PRINTED = ("file", "kind", "severity", "message", "remedy")


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. ``file``: posix path relative to the data folder, empty for the whole set. An error
    stops a training or spoils what the picture teaches; a warning is worth a look; an info changes nothing.
    values: the tags or words that the message quotes. files: every picture that it concerns, where that is more than
    ``file``."""

    file: str
    kind: str
    severity: Severity
    message: str
    remedy: str
    values: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


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
            "findings": [{name: getattr(finding, name) for name in _PRINTED} for finding in self.findings],
            "images": self.images,
            "captions": self.captions,
            "buckets": [{**row, "resolution": list(row["resolution"])} for row in self.buckets],
            "steps_preview": dict(self.steps_preview),
            "stops_training": self.stops_training,
        }

    def to_text(self) -> str:
        """The same for a terminal: findings from the worst to the least, then what a training would do."""
        lines = []
        for finding in self.findings:
            place = f"{finding.file}: " if finding.file else ""
            lines.append(f"{finding.severity + ':':<9}{place}{finding.message} {finding.remedy}")
        lines.append(f"{self.images} pictures, {self.captions} with a caption of their own")
        for row in self.buckets:
            width, height = row["resolution"]
            lines.append(f"  {width}×{height}: {row['images']} pictures, seen {row['count']} times an epoch")
        lines.append(verdict(self.findings, self.stops_training))
        return "\n".join(lines)


def verdict(findings: Sequence[Finding], stops_training: bool) -> str:
    """What the findings come to, in one sentence."""
    if stops_training:
        return "A training would not start."
    if any(finding.severity == "error" for finding in findings):
        return "A training can start, but leaves out or learns badly what the errors name."
    return "A training can start."


def enumerate_some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
