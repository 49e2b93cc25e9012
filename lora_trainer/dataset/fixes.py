"""What can be put right with one click: findings of the checks that have a remedy which loses nothing.

A fix is a step of the edit session: it can be undone, and is in no file before it is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_trainer.dataset.captions import escape
from lora_trainer.dataset.editing import EditSession, Step
from lora_trainer.dataset.edits import Edit
from lora_trainer.dataset.findings import Finding
from lora_trainer.errors import UserError

_EXCLUDABLE = (
    "duplicate", "near-duplicate", "changed-copy", "unreadable", "blurred", "dark", "bright", "too-small",
    "aspect-ratio",
)  # fmt: skip
_CROPPED_ASPECT = 2.0


@dataclass(frozen=True)
class Fix:
    """``label`` says on the button what it does. ``safe``: right in nearly every case, so that "fix all" may do it;
    the others need a look first."""

    name: str
    label: str
    safe: bool


def fixes_of(finding: Finding) -> tuple[Fix, ...]:
    """What can be done about a finding, the best first; nothing where only a person can tell."""
    if finding.kind == "trigger-missing":
        return (Fix("add-trigger", f"Put {finding.values[0]!r} first", True),)
    if finding.kind == "near-synonyms":
        seldom, often = finding.values
        return (Fix("use-frequent", f"Write {often!r} for {seldom!r}", True),)
    if finding.kind == "universal-tag":
        tag = finding.values[0]
        return (Fix("mark-core", f"Mark {tag!r} as core", False), Fix("remove-tag", f"Remove {tag!r}", False))
    if finding.kind == "core-missing":
        return (Fix("add-core", f"Add {finding.values[0]!r} to {len(finding.files)} captions", False),)
    if finding.kind == "aspect-ratio":
        return (Fix("crop", "Crop to 2:1 around the center", False), Fix("exclude", "Exclude the picture", False))
    if finding.kind in _EXCLUDABLE and finding.file:
        return (Fix("exclude", "Exclude the picture", finding.kind in ("duplicate", "unreadable")),)
    return ()


def apply_fix(session: EditSession, finding: Finding, name: str) -> Step:
    """Do a fix of a finding as one step. Raises UserError when the finding has no such fix."""
    fix = next((fix for fix in fixes_of(finding) if fix.name == name), None)
    if fix is None:
        raise UserError(f"There is no fix {name!r} for this finding.", field="fix", remedy="Check the folder again.")
    if name in ("exclude", "crop"):
        edit = session.pictures.get(finding.file)
        if edit is None:
            raise UserError(f"There is no picture {finding.file!r} here.", remedy="Check the folder again.")
        changes = {"excluded": True} if name == "exclude" else {"crop": _center_crop(session, finding)}
        changed = replace(edit, **changes)
        return session.edit_pictures({finding.file: changed}, fix.label)
    captioned = [key for key, text in session.captions.items() if text]
    if name == "add-trigger":
        # Every finding of its kind names one picture, or all of them.
        keys = list(finding.files) or [finding.file]
        return session.edit(Edit("add", escape(finding.values[0]), place="start"), keys)
    if name == "use-frequent":
        seldom, often = finding.values
        return session.edit(Edit("replace", escape(often), (seldom,)), captioned)
    if name == "add-core":
        return session.edit(Edit("add", f"**{escape(finding.values[0])}**", place="start"), finding.files)
    whole = Edit("mark", "core", finding.values) if name == "mark-core" else Edit("remove", tags=finding.values)
    return session.edit(whole, captioned)


def apply_safe_fixes(session: EditSession, findings: tuple[Finding, ...]) -> list[Step]:
    """Everything that is safe, each as a step of its own."""
    steps = []
    for finding in findings:
        for fix in fixes_of(finding)[:1]:
            if fix.safe:
                step = apply_fix(session, finding, fix.name)
                if step.keys:
                    steps.append(step)
    return steps


def _center_crop(session: EditSession, finding: Finding) -> tuple[float, float, float, float]:
    from lora_trainer.dataset.images import measure

    (width, height), _ = measure(session.paths[finding.file])
    if session.pictures[finding.file].rotate in (90, 270):
        width, height = height, width
    share = _CROPPED_ASPECT * min(width, height) / max(width, height)
    if share >= 1:
        return (0.0, 0.0, 1.0, 1.0)
    start = (1 - share) / 2
    return (start, 0.0, 1 - start, 1.0) if width > height else (0.0, start, 1.0, 1 - start)
