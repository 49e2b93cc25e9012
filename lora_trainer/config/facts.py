"""What the package knows of a setting besides its type: limits and ``Facts``, kept in the field's metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

CHANGES = ("words", "pair", "slider")
"""The kinds of training in which an image model learns a change (``config.changes``)."""


@dataclass(frozen=True)
class Facts:
    """What the rest of the package must know of a setting, besides its type.

    decides: another value makes another LoRA. False for what names a place (what lies there is compared by its
    content) and for what only concerns the results' files.
    path: the value is a path that the run reads or writes.
    or_name: instead of a path it may be a name of the host's list. words: what it may be instead of a path.
    given_by: who sets it where there is a page: its three steps, its form, a file of settings alone, or the job,
    whatever a person says.
    fills_memory: another value needs another amount of the device's memory.
    sets_pace: minutes that were measured with another value say nothing.
    separator: stands between the parts of a list that is one text; None for the comma.
    plugin: the kind of plug-in that adds choices.
    task: the kind of training in which it has a meaning: "image" for all of image models; None for all there are.
    """

    decides: bool = True
    path: Literal["read", "write"] | None = None
    or_name: bool = False
    words: tuple[str, ...] = ()
    given_by: Literal["form", "steps", "file", "job"] = "form"
    fills_memory: bool = False
    sets_pace: bool = False
    separator: str | None = None
    plugin: str | None = None
    task: Literal["image", "words", "pair", "slider", "text"] | None = None

    def applies(self, task: str) -> bool:
        """Whether the setting means something in a training of this kind."""
        return self.task in (None, task) or (self.task == "image" and task in CHANGES)


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    remedy: str | None = None,
    **facts: Any,
) -> Any:
    """A dataclass field with limits, ``minimum <= value <= maximum`` and ``value > above``, and its ``Facts``."""
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "remedy": remedy}
    metadata = {name: value for name, value in limits.items() if value is not None} | {"facts": Facts(**facts)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
