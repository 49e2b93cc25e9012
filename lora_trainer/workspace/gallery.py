"""Which pictures of an edit session a page of the editor shows, and what it says of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_trainer.errors import UserError

if TYPE_CHECKING:
    from lora_trainer.dataset.editing import EditSession

STATES = ("captioned", "uncaptioned", "excluded", "included", "edited", "unsaved")
ANY_PROBLEM = "any"


@dataclass(frozen=True)
class Filter:
    """All that is given must hold. text: in the caption or the file's name. tags: every one of them; missing: none of
    them; core, mood: marked so. problem: a kind of finding, or "any". state: one of ``STATES``."""

    text: str = ""
    tags: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    core: str = ""
    mood: str = ""
    problem: str = ""
    state: str = ""


@dataclass(frozen=True)
class _Entry:
    tags: frozenset[str]
    core: frozenset[str]
    mood: frozenset[str]


class Gallery:
    """Filters the pictures of one session. What a caption holds is worked out once for each text."""

    def __init__(self, session: EditSession):
        self.session = session
        self._entries: dict[str, _Entry] = {}

    def keys(self, wanted: Filter, problems: Mapping[str, frozenset[str]]) -> list[str]:
        """The pictures that pass, in order of their names. problems: picture -> kinds of its findings.

        Raises:
            UserError: there is no such state.
        """
        from lora_trainer.dataset.edits import identity

        if wanted.state and wanted.state not in STATES:
            remedy = f"One of {', '.join(STATES)}."
            raise UserError(f"There is no state {wanted.state!r}.", field="state", remedy=remedy)
        session = self.session
        with session.lock:
            tags = {identity(tag) for tag in wanted.tags if tag.strip()}
            missing = {identity(tag) for tag in wanted.missing if tag.strip()}
            core, mood, text = identity(wanted.core), identity(wanted.mood), wanted.text.strip().casefold()
            unsaved = set(session.unsaved) if wanted.state == "unsaved" else set()
            found = []
            for key in session.paths:
                if wanted.state and not self._is(key, wanted.state, unsaved):
                    continue
                if wanted.problem and not self._has_problem(problems.get(key, frozenset()), wanted.problem):
                    continue
                if text and text not in key.casefold() and text not in session.captions[key].casefold():
                    continue
                if tags or missing or core or mood:
                    entry = self._entry(key)
                    if not tags <= entry.tags or missing & entry.tags:
                        continue
                    if (core and core not in entry.core) or (mood and mood not in entry.mood):
                        continue
                found.append(key)
        return found

    def _is(self, key: str, state: str, unsaved: set[str]) -> bool:
        edit = self.session.pictures[key]
        return {
            "captioned": bool(self.session.captions[key]),
            "uncaptioned": not self.session.captions[key],
            "excluded": edit.excluded,
            "included": not edit.excluded,
            "edited": edit.changes_pixels,
            "unsaved": key in unsaved,
        }[state]

    @staticmethod
    def _has_problem(kinds: frozenset[str], wanted: str) -> bool:
        return bool(kinds) if wanted == ANY_PROBLEM else wanted in kinds

    def _entry(self, key: str) -> _Entry:
        from lora_trainer.dataset.captions import plain_text
        from lora_trainer.dataset.edits import identity

        text = self.session.captions[key]
        entry = self._entries.get(text)
        if entry is None:
            items = [(identity(plain_text(item)), item) for item in self.session.parsed(key).items]
            entry = self._entries[text] = _Entry(
                frozenset(name for name, _ in items),
                frozenset(name for name, item in items if item.is_core),
                frozenset(name for name, item in items if item.is_mood),
            )
        return entry
