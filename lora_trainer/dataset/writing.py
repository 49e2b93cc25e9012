"""Writing captions so that no word of a person is lost.

A caption goes back to where it was read from: its row of metadata.csv or metadata.jsonl, or its text file. Everything
else in those files stays. Before a file is changed it is kept in a numbered backup; every file is replaced in one step,
so that whoever is killed in between leaves each caption either old or new.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from lora_trainer.dataset.backups import make_backup
from lora_trainer.dataset.caption_files import (
    CaptionSource,
    caption_files,
    metadata_files,
    metadata_prefix,
    read_captions,
    some,
)
from lora_trainer.dataset.captions import parse, plain_text
from lora_trainer.dataset.keys import stem_of
from lora_trainer.dataset.links import Links
from lora_trainer.dataset.listing import Listing, NameIndex, list_folder
from lora_trainer.dataset.metadata import CaptionProblem
from lora_trainer.dataset.metadata_rows import REWRITERS
from lora_trainer.errors import UserError, has_half_characters
from lora_trainer.files import atomic_write

Mode = Literal["keep", "append", "prepend", "replace"]
MODES: tuple[Mode, ...] = ("keep", "append", "prepend", "replace")
TEXT_KINDS = (".txt", ".caption")

_BOM = b"\xef\xbb\xbf"
_locks: dict[str, threading.RLock] = defaultdict(threading.RLock)


class ConflictError(UserError):
    """Somebody else changed captions in the meantime. ``current``: key -> what is in the files now."""

    def __init__(self, current: Mapping[str, str]):
        super().__init__(
            f"Somebody changed these captions in the meantime: {some(sorted(current))}.",
            remedy="Look at both texts; then save yours over them, or take theirs.",
        )
        self.current = dict(current)


@dataclass(frozen=True)
class Written:
    """files: those that changed. backup: the number of the backup of what they were, None when all are new."""

    files: tuple[Path, ...] = ()
    backup: int | None = None


@dataclass(frozen=True)
class Captions:
    """The captions of a folder at one moment: where each comes from, and what is wrong with the files."""

    listing: Listing
    sources: Mapping[str, CaptionSource]
    problems: tuple[CaptionProblem, ...]
    names: NameIndex = field(repr=False)

    def text(self, key: str) -> str:
        """The caption of a picture as written, "" when there is none."""
        source = self.sources.get(key)
        return source.text if source else ""

    @cached_property
    def keys_of(self) -> Mapping[Path, Sequence[str]]:
        """The pictures whose captions come from a file, by its path."""
        found: dict[Path, list[str]] = defaultdict(list)
        for key, source in self.sources.items():
            found[source.path].append(key)
        return found

    @cached_property
    def table(self) -> Path | None:
        """The metadata file of the folder itself."""
        return next((path for path in metadata_files(self.listing, None, []) if path.parent == self.listing.root), None)

    @cached_property
    def stems(self) -> Counter[str]:
        """How many pictures have a name, whatever its ending."""
        return Counter(map(stem_of, self.listing.pictures))

    @cached_property
    def unreadable(self) -> dict[Path, CaptionProblem]:
        """The caption files that cannot be read, and therefore are not written either."""
        return {problem.path: problem for problem in self.problems if problem.fatal}


class CaptionFolder:
    """The captions of one data folder. Reads the disk anew every time; safe in threads.

    output: where captions are written instead of where they come from: the path of a metadata file (.csv, .jsonl), or
        the ending of text files (".txt", ".caption"). A metadata file given so is also read first.
    confined: neither read nor write through links that lead out of the folder.
    links: which of those are followed otherwise, see ``list_folder``; all of them where nothing is said.
    """

    def __init__(
        self,
        root: Path,
        metadata_path: str | Path | None = None,
        caption_extension: str = ".txt",
        *,
        output: Path | str | None = None,
        confined: bool = False,
        links: Links | None = None,
    ):
        self.root = Path(root)
        self.metadata_path = Path(metadata_path) if metadata_path else None
        self.caption_extension = caption_extension
        self.output = output
        self.links: Links = links or ("none" if confined else "all")
        self.confined = confined
        if isinstance(output, Path):
            if output.suffix.casefold() not in REWRITERS:
                raise UserError(f"{output.name} is neither a .csv nor a .jsonl file.", field="output",
                                remedy="Name a file such as metadata.csv.")  # fmt: skip
            if output.is_file():
                self.metadata_path = output

    def read(self) -> Captions:
        """Raises UserError when there is no such folder. Files that cannot be read are among ``problems``."""
        listing = list_folder(self.root, links=self.links)
        problems: list[CaptionProblem] = []
        sources = read_captions(
            self.root, self.metadata_path, self.caption_extension, problems=problems, listing=listing
        )
        return Captions(listing, sources, tuple(problems), NameIndex(listing))

    def write(
        self,
        captions: Mapping[str, str],
        *,
        expected: Mapping[str, str] | None = None,
        kept: Collection[Path] = (),
    ) -> Written:
        """Give these pictures these captions.

        expected: what the writer believes to be in the files now ("" for no caption).
        kept: files that the writer has backed up already, and whose present state nobody will miss.

        Raises:
            ConflictError: a caption is neither as expected nor as it is to become. Nothing is written then.
            UserError: a picture that is not there, a caption that cannot be written, a file that cannot be read as
                captions, or a full disk.
        """
        return self.update(lambda current: _checked(current, captions, expected or {}), kept=kept)

    def update(
        self, change: Callable[[Captions], Mapping[str, str]], *, kept: Collection[Path] = ()
    ) -> Written:
        """Write the captions that ``change`` makes of what is in the files at this moment. Raises as ``write``."""
        with _locks[str(self.root.resolve())]:
            current = self.read()
            contents = self._contents(current, change(current))
            number = make_backup(self.root, [path for path in contents if path not in kept])
            for path, data in contents.items():
                atomic_write(path.resolve(), data)  # a link stays a link
        return Written(tuple(contents), number)

    # -- which files change, and to what

    def _contents(self, current: Captions, captions: Mapping[str, str]) -> dict[Path, bytes]:
        texts: dict[Path, dict[str, str]] = defaultdict(dict)
        tables: dict[Path, dict[str, str]] = defaultdict(dict)
        for key, text in captions.items():
            if key not in current.listing.pictures:
                raise UserError(f"There is no picture {key} in {self.root}.", remedy="Reload the folder.")
            if "\0" in text or has_half_characters(text):
                raise UserError(f"The caption of {key} holds characters that no file takes.", field="captions")
            source = current.sources.get(key)
            if source is not None and source.text == text.strip() and self.output is None:
                continue
            table = self._table(current, source)
            if table is not None:
                tables[table][key] = text.strip()
            else:
                texts[self._text_file(current, key, source)][key] = text.strip()
        for path in (*texts, *tables):
            self._refuse_unsafe(current, path)
        contents = {path: self._text_bytes(current, path, members) for path, members in texts.items()}
        contents |= {path: self._table_bytes(current, path, members) for path, members in tables.items()}
        return {path: data for path, data in contents.items() if not path.is_file() or path.read_bytes() != data}

    def _table(self, current: Captions, source: CaptionSource | None) -> Path | None:
        """The metadata file that a caption goes to; None for a text file."""
        if isinstance(self.output, Path):
            return self.output
        if self.output is not None:
            return None
        if source is not None:
            return source.path if source.kind == "metadata" else None
        if self.metadata_path is not None:
            return self.metadata_path
        return current.table

    def _text_file(self, current: Captions, key: str, source: CaptionSource | None) -> Path:
        if source is not None and self.output is None:
            return source.path
        ending = self.output if isinstance(self.output, str) else self.caption_extension
        ending = ending if ending.startswith(".") else f".{ending}"
        candidates = caption_files(current.listing, current.names, key, ending)
        if self.output is not None:
            candidates = [path for path in candidates if path.suffix.casefold() == ending.casefold()]
        if candidates:
            return candidates[0]
        stem = stem_of(key)
        return current.listing.root / ((key if current.stems[stem] > 1 else stem) + ending)

    def _text_bytes(self, current: Captions, path: Path, members: Mapping[str, str]) -> bytes:
        shared = set(current.keys_of.get(path, ()))
        wanted = {members.get(key, current.text(key)) for key in shared | set(members)}
        if len(wanted) > 1:
            raise UserError(
                f"{some(sorted(shared | set(members)))} share the caption file {path.name}.",
                remedy="Rename one of the pictures, so that each has a caption file of its own.",
            )
        text = next(iter(members.values()))
        return f"{text}\n".encode() if text else b""

    def _table_bytes(self, current: Captions, path: Path, members: Mapping[str, str]) -> bytes:
        # Texts are replaced by the line they were read from; rows without a caption are filled by their name.
        data = path.read_bytes() if path.is_file() else b""
        prefix = metadata_prefix(path, current.listing.root)
        lines = {current.sources[key].line: key for key in current.keys_of.get(path, ()) if key in members}
        open_keys = set(members) - set(lines.values())

        def change(line: int, name: str, caption: str) -> str | None:
            if line in lines:
                return members[lines[line]]
            key = current.names.find(prefix + name) or current.names.find(name)
            if key in open_keys and not caption:
                open_keys.discard(key)
                return members[key]
            return None

        rewrite = REWRITERS[path.suffix.casefold()]
        text = rewrite(data.decode("utf-8-sig"), change, [])
        added = [(key.removeprefix(prefix), members[key]) for key in members if key in open_keys]
        text = rewrite(text, lambda line, name, caption: None, added)
        return (_BOM if data.startswith(_BOM) else b"") + text.encode("utf-8")

    def _refuse_unsafe(self, current: Captions, path: Path) -> None:
        if problem := current.unreadable.get(path):
            raise UserError(str(problem), remedy="Put the file right first; it was not touched.")
        unread = path.is_symlink() and path not in current.listing.files.values()
        leads_out = self.root.resolve() not in path.resolve().parents
        if leads_out and (self.confined or unread) and path != self.metadata_path:
            raise UserError(f"{path.name} leads out of the folder, so it is not written.", field="captions")


def merge(old: str, new: str, mode: Mode) -> str:
    """What a picture's caption becomes when ``new`` comes to ``old``. ``append`` and ``prepend`` add only the items
    that are not there yet; nothing of ``old`` changes."""
    if mode == "replace" or not old.strip():
        return new
    if mode == "keep":
        return old
    known = {_identity(plain_text(item)) for item in parse(old).items}
    fresh = [item.source for item in parse(new).items if _identity(plain_text(item)) not in known]
    return ", ".join([old, *fresh] if mode == "append" else [*fresh, old])


def _checked(current: Captions, captions: Mapping[str, str], expected: Mapping[str, str]) -> Mapping[str, str]:
    changed = {
        key: current.text(key)
        for key, text in captions.items()
        if key in expected and current.text(key) not in (expected[key].strip(), text.strip())
    }
    if changed:
        raise ConflictError(changed)
    return captions


def _identity(text: str) -> str:
    return " ".join(text.casefold().split())
