"""Captioning a folder: the same function serves the command line, the tab and a training without captions."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lora_trainer.captioning.base import Captioner, Settings, UnavailableError
from lora_trainer.captioning.batches import describe_all
from lora_trainer.captioning.postprocess import CaptionOptions, make_caption
from lora_trainer.captioning.registry import AUTO, Sources, choose, open_captioner
from lora_trainer.config import TrainConfig
from lora_trainer.dataset.caption_files import caption_files, read_captions
from lora_trainer.dataset.captions import escape
from lora_trainer.dataset.folder import folders_of_results
from lora_trainer.dataset.images import flatten, open_image
from lora_trainer.dataset.listing import KohyaFolders, NameIndex, list_folder
from lora_trainer.dataset.picture_edits import UNTOUCHED, load_edits
from lora_trainer.dataset.writing import MODES, CaptionFolder, Mode, merge
from lora_trainer.errors import UserError
from lora_trainer.training.callbacks import TrainCallbacks, TrainCommands
from lora_trainer.training.precision import resolve

SAVE_SECONDS = 2.0
"""Captions are written at least so often; whoever is killed loses no more than this."""


@dataclass(frozen=True)
class CaptionJob:
    """What to caption and how. keys: only these pictures; None for all. settings.device "auto" is resolved."""

    folder: CaptionFolder
    captioner: str = AUTO
    mode: Mode = "keep"
    options: CaptionOptions = field(default_factory=CaptionOptions)
    settings: Settings = field(default_factory=Settings)
    batch_size: int = 8
    keys: Collection[str] | None = None
    copy_kept: bool = False  # also write the captions that stay, so that a metadata file is complete


@dataclass(frozen=True)
class CaptionResult:
    """written: captions that are new or changed. kept: pictures whose caption stayed. skipped: (picture, reason).
    cancelled: not all pictures were seen. captioner: which one it was."""

    captioner: str
    written: int
    kept: int
    skipped: tuple[tuple[str, str], ...] = ()
    cancelled: bool = False


class CaptionCallbacks:
    """Override what you want to hear."""

    def on_progress(self, done: int, total: int) -> None: ...

    def on_warning(self, text: str) -> None: ...

    def on_caption(self, key: str, caption: str) -> None: ...


def caption_folder(
    job: CaptionJob,
    sources: Sources,
    *,
    callbacks: CaptionCallbacks | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> CaptionResult:
    """Describe the pictures of a folder and write what the mode lets; existing captions stay unless it says otherwise.

    What a person writes meanwhile counts: each caption is merged with what is in the file at that moment. An excluded
    picture is not described. Killed at any time, each caption is either old or new.

    turn: entered while the captioner is loaded and around each batch.

    Raises:
        UserError: no folder or picture, no captioner, a bad template, a file that cannot be written.
    """
    callbacks = callbacks or CaptionCallbacks()
    job.options.check()
    if job.mode not in MODES:
        raise UserError(f"There is no mode {job.mode!r}.", field="mode", remedy=f"One of {', '.join(MODES)}.")
    current = job.folder.read()
    edits = load_edits(job.folder.root)
    if not current.listing.pictures:
        raise UserError(f"There are no pictures in {job.folder.root}.", field="input", remedy="Name another folder.")
    for problem in current.unreadable.values():
        raise UserError(str(problem), remedy="Put the file right first; it was not touched.")
    wanted = [
        key for key in current.listing.pictures
        if (job.keys is None or key in job.keys) and not edits.get(key, UNTOUCHED).excluded
    ]  # fmt: skip
    todo = [key for key in wanted if job.mode != "keep" or not current.text(key)]
    left = set(todo)
    kept = {key: current.text(key) for key in wanted if key not in left}
    name = choose(job.captioner, sources) if todo else job.captioner
    skipped: list[tuple[str, str]] = []

    def load(key: str) -> Image.Image | None:
        try:
            picture = edits.get(key, UNTOUCHED).apply(open_image(current.listing.pictures[key]))
        except UserError as error:
            skipped.append((key, error.message))
            callbacks.on_warning(error.message)
            return None
        return flatten(picture)

    writer = _Writer(job.folder, job.mode, callbacks)
    if kept and job.copy_kept:
        writer.copy(kept)
    if todo:
        with turn():
            captioner = open_captioner(name, job.settings, sources)
        try:
            for keys, descriptions in describe_all(
                captioner, todo, load, batch_size=job.batch_size, turn=turn,
                on_smaller=lambda size: callbacks.on_warning(f"Memory is short: {size} pictures at once from here on."),
            ):  # fmt: skip
                writer.add({key: make_caption(one, job.options, escape) for key, one in zip(keys, descriptions)})
                callbacks.on_progress(writer.seen + len(skipped), len(todo))
                if cancelled():
                    break
        finally:
            try:
                writer.flush()
            finally:
                _close(captioner, turn)
    unseen = len(todo) - writer.seen - len(skipped)
    return CaptionResult(name, writer.written, len(kept) + writer.unchanged, tuple(skipped), unseen > 0)


def training_captioner(config: TrainConfig, sources: Sources) -> str | None:
    """The captioner that a training with this configuration would use first, as its folder has not a single caption.
    None where it has, and where no captioner can run: the scan then says what is missing."""
    return _usable(sources) if _wordless(config) else None


def caption_for_training(
    config: TrainConfig,
    callbacks: TrainCallbacks,
    commands: TrainCommands,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    sources: Sources | None = None,
) -> CaptionResult | None:
    """Write metadata.csv for a training folder that ``training_captioner`` has a captioner for; else do nothing."""
    sources = sources or Sources()
    pictures = _wordless(config)
    name = _usable(sources) if pictures else None
    if name is None:
        return None
    root = Path(config.train_data_dir)
    callbacks.on_warning(f"No picture has a caption: {name} describes them, in {root / 'metadata.csv'}.")
    heard = CaptionCallbacks()
    heard.on_progress = lambda done, total: callbacks.on_phase("captioning", done, total)  # type: ignore[method-assign]
    heard.on_warning = callbacks.on_warning  # type: ignore[method-assign]
    job = CaptionJob(
        CaptionFolder(root, None, config.caption_extension, output=root / "metadata.csv"),
        name,
        settings=Settings(device=str(resolve(config.device, "no").device)),
        keys=pictures,
    )
    return caption_folder(job, sources, callbacks=heard, cancelled=lambda: commands.stopping, turn=turn)


def _wordless(config: TrainConfig) -> list[str]:
    """The pictures of a training folder without any words: no caption, no class in a folder's name, no trigger word.
    Empty where there are some."""
    root = Path(config.train_data_dir)
    if not config.train_data_dir or config.metadata_path or not root.is_dir():
        return []
    if config.trigger_word.strip() or config.default_caption.strip():
        return []
    listing = list_folder(root, folders_of_results(config))
    names = NameIndex(listing)
    if any(caption_files(listing, names, key, config.caption_extension) for key in listing.pictures):
        return []
    problems: list = []
    captions = read_captions(root, None, config.caption_extension, problems=problems, listing=listing)
    if captions or problems or any(map(KohyaFolders(root).above, listing.pictures)):
        return []
    return list(listing.pictures)


def _usable(sources: Sources) -> str | None:
    try:
        return choose(AUTO, sources)
    except UnavailableError:
        return None


class _Writer:
    """Collects captions and writes them now and then; counts what changed."""

    def __init__(self, folder: CaptionFolder, mode: Mode, callbacks: CaptionCallbacks):
        self._folder, self._mode, self._callbacks = folder, mode, callbacks
        self._waiting: dict[str, str] = {}
        self._kept: set[Path] = set()
        self._last = time.monotonic()
        self.seen = self.written = self.unchanged = 0

    def copy(self, captions: dict[str, str]) -> None:
        """Write captions that stay into the output as well, which counts more than the files they come from."""
        self._kept.update(self._folder.write(captions).files)

    def add(self, captions: dict[str, str]) -> None:
        self.seen += len(captions)
        self._waiting.update(captions)
        if time.monotonic() - self._last >= SAVE_SECONDS:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        described: dict[str, str] = {}

        def merged(current) -> dict[str, str]:
            here = {key: text for key, text in waiting.items() if key in current.listing.pictures and text}
            for key, text in here.items():
                result = merge(current.text(key), text, self._mode)
                if result != current.text(key):
                    described[key] = result
            return described

        self._kept.update(self._folder.update(merged, kept=self._kept).files)
        self.written += len(described)
        self.unchanged += len(waiting) - len(described)
        self._last = time.monotonic()
        for key, text in described.items():
            self._callbacks.on_caption(key, text)


def _close(captioner: Captioner, turn: Callable[[], AbstractContextManager[None]]) -> None:
    with turn():
        captioner.close()
