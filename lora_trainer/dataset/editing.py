"""An edit session: changes to captions and pictures that can be undone, and are in no file before they are saved."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_trainer.dataset.captions import Caption, parse
from lora_trainer.dataset.edits import Edit, check_caption
from lora_trainer.dataset.picture_edits import UNTOUCHED, PictureEdit, load_edits, save_edits
from lora_trainer.dataset.writing import CaptionFolder, ConflictError, Written
from lora_trainer.errors import UserError

MAX_STEPS = 200
"""Steps that can be undone; older ones stay done."""

_MAX_PARSED = 20_000


@dataclass(frozen=True)
class Step:
    """One thing a person did: key -> (before, after), for captions and for pictures."""

    label: str
    captions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    pictures: Mapping[str, tuple[PictureEdit, PictureEdit]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.captions, *self.pictures)))


class EditSession:
    """The captions and picture edits of one folder as a person sees them now. Safe in threads.

    ``captions`` and ``pictures`` hold the current values, ``unsaved`` the keys that differ from the files.
    """

    def __init__(self, folder: CaptionFolder):
        self.folder = folder
        self.lock = threading.RLock()
        self._done: list[Step] = []
        self._undone: list[Step] = []
        self._backed_up: set[Path] = set()
        self._parsed: dict[str, Caption] = {}
        self.revision = 0  # grows with every change, for whoever keeps something derived
        self._load()

    def _load(self) -> None:
        current = self.folder.read()
        edits = load_edits(self.folder.root)
        self.problems = current.problems
        self.paths = dict(current.listing.pictures)
        self.saved_captions = {key: current.text(key) for key in self.paths}
        self.saved_pictures = {key: edits.get(key, UNTOUCHED) for key in self.paths}
        self.captions = dict(self.saved_captions)
        self.pictures = dict(self.saved_pictures)

    # -- looking

    @property
    def root(self) -> Path:
        return self.folder.root

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Pictures whose caption or edit is in no file yet."""
        with self.lock:
            return tuple(
                key for key in self.paths
                if self.captions[key] != self.saved_captions[key] or self.pictures[key] != self.saved_pictures[key]
            )  # fmt: skip

    @property
    def undo_label(self) -> str | None:
        return self._done[-1].label if self._done else None

    @property
    def redo_label(self) -> str | None:
        return self._undone[-1].label if self._undone else None

    def parsed(self, key: str) -> Caption:
        """The current caption of a picture, parsed once for each text."""
        text = self.captions[key]
        caption = self._parsed.get(text)
        if caption is None:
            if len(self._parsed) >= _MAX_PARSED:
                self._parsed.clear()
            caption = self._parsed[text] = parse(text)
        return caption

    # -- changing

    def edit(self, edit: Edit, keys: Iterable[str]) -> Step:
        """Do ``edit`` to the captions of these pictures. Raises UserError for an unknown picture or a bad edit."""
        change = edit.function()
        with self.lock:
            changed = {}
            for key in self._known(keys):
                before = self.captions[key]
                after = change(before).strip()
                if after != before:
                    changed[key] = (before, after)
            return self._do(Step(_label(edit), captions=changed))

    def set_captions(self, captions: Mapping[str, str], label: str = "captions") -> Step:
        """Give pictures these captions as one step."""
        for text in captions.values():
            check_caption(text)
        return self._set_captions(captions, label)

    def _set_captions(self, captions: Mapping[str, str], label: str) -> Step:
        with self.lock:
            self._known(captions)
            changed = {
                key: (self.captions[key], text.strip())
                for key, text in captions.items()
                if text.strip() != self.captions[key]
            }
            return self._do(Step(label, captions=changed))

    def edit_pictures(self, edits: Mapping[str, PictureEdit], label: str = "pictures") -> Step:
        """Exclude, turn or crop pictures."""
        with self.lock:
            self._known(edits)
            changed = {
                key: (self.pictures[key], edit) for key, edit in edits.items() if edit != self.pictures[key]
            }
            return self._do(Step(label, pictures=changed))

    def undo(self) -> Step:
        """Take the last step back. Raises UserError when there is none."""
        with self.lock:
            if not self._done:
                raise UserError("There is nothing to undo.", remedy="Backups of the saved files are in the list.")
            step = self._done.pop()
            self._undone.append(step)
            self.captions.update({key: before for key, (before, _) in step.captions.items()})
            self.pictures.update({key: before for key, (before, _) in step.pictures.items()})
            self.revision += 1
            return step

    def redo(self) -> Step:
        """Do the last undone step again. Raises UserError when there is none."""
        with self.lock:
            if not self._undone:
                raise UserError("There is nothing to do again.", remedy="Change something first.")
            step = self._undone.pop()
            self._done.append(step)
            self._apply(step)
            return step

    def _do(self, step: Step) -> Step:
        if step.keys:
            self._done = [*self._done, step][-MAX_STEPS:]
            self._undone.clear()
            self._apply(step)
        return step

    def _apply(self, step: Step) -> None:
        self.captions.update({key: after for key, (_, after) in step.captions.items()})
        self.pictures.update({key: after for key, (_, after) in step.pictures.items()})
        self.revision += 1

    def _known(self, keys: Iterable[str]) -> list[str]:
        keys = list(keys)
        unknown = next((key for key in keys if key not in self.paths), None)
        if unknown is not None:
            raise UserError(f"There is no picture {unknown!r} here.", field="files", remedy="Reload the folder.")
        return keys

    # -- files

    def save(self, *, force: bool = False) -> Written:
        """Write what is unsaved. What somebody else changed in other captions meanwhile is taken over.

        force: write over what somebody else changed in the same captions; it is in the backup.

        Raises:
            ConflictError: somebody else changed the same captions. Nothing is written.
            UserError: a file cannot be written, or the pictures are not there.
        """
        with self.lock:
            self._check_still_there()
            dirty = {key: text for key, text in self.captions.items() if text != self.saved_captions[key]}
            expected = None if force else {key: self.saved_captions[key] for key in dirty}
            written = Written()
            if dirty:
                # Single captions that are typed one after the other make one backup: that of what was there before.
                kept = self._backed_up if len(dirty) == 1 and not force else ()
                written = self.folder.write(dirty, expected=expected, kept=kept)
                self._backed_up.update(written.files)
            self.saved_captions.update(dirty)
            edits = {key: edit for key, edit in self.pictures.items() if edit != self.saved_pictures[key]}
            if edits:
                save_edits(self.root, edits)
                self.saved_pictures.update(edits)
            self.refresh()
            return written

    def refresh(self) -> ConflictError | None:
        """Take over what changed in the files: new and removed pictures, captions that are not edited here.

        Returns the conflict, if captions that are edited here changed in the files as well. Raises UserError, and
        forgets nothing, when something is unsaved and the pictures are not there.
        """
        with self.lock:
            self._check_still_there()
            captions, pictures, saved = self.captions, self.pictures, self.saved_captions
            saved_pictures, dirty = self.saved_pictures, set(self.unsaved)
            self._load()
            conflicts = {}
            for key in dirty & self.paths.keys():
                if captions[key] != saved[key] and self.saved_captions[key] != captions[key]:
                    self.captions[key] = captions[key]
                    if self.saved_captions[key] != saved[key]:
                        conflicts[key] = self.saved_captions[key]
                        self.saved_captions[key] = saved[key]  # so that saving reports it again
                if pictures[key] != saved_pictures[key]:
                    self.pictures[key] = pictures[key]
            self._done = [step for step in self._done if self._holds(step)]
            self._undone = [step for step in self._undone if self._holds(step)]
            if (captions, pictures) != (self.captions, self.pictures):
                self.revision += 1
            return ConflictError(conflicts) if conflicts else None

    def _check_still_there(self) -> None:
        """A drive that is away for a moment leaves no folder, or an empty one: nobody's words end with that."""
        if self.unsaved and not any(path.is_file() for path in self.paths.values()):
            raise UserError(
                f"{self.root.name} has none of its pictures any more; what is unsaved stays here.",
                remedy="Bring them back, or discard the changes.",
            )

    def take_theirs(self, keys: Iterable[str]) -> Step:
        """End a conflict: these captions become what is in the files. Undo brings the own words back."""
        with self.lock:
            keys = self._known(keys)
            current = self.folder.read()
            texts = {key: current.text(key) for key in keys}
            self.saved_captions.update(texts)
            return self._set_captions(texts, "take over what is in the files")

    def discard(self) -> None:
        """Forget what is unsaved and all steps; the files are read again."""
        with self.lock:
            self._done.clear()
            self._undone.clear()
            self._load()
            self.revision += 1

    def _holds(self, step: Step) -> bool:
        return all(key in self.paths for key in step.keys)


def _label(edit: Edit) -> str:
    if edit.kind == "regex":
        return f"replace {edit.pattern!r}"
    tags = ", ".join(edit.tags)
    return {
        "set": "write a caption",
        "add": f"add {edit.value}",
        "remove": f"remove {tags}",
        "replace": f"replace {tags} by {edit.value}",
        "move": f"move {tags} to the {edit.place}",
        "mark": f"mark {tags} as {edit.value}",
    }[edit.kind]
