"""``caption``: describe the pictures of a folder."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.errors import UserError

DONE, INTERRUPTED = 0, 130


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("caption", help="describe the pictures of a folder", description=run.__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder with pictures")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="metadata.csv or .jsonl to write (metadata.csv in the folder)")  # fmt: skip
    parser.add_argument("--format", choices=("csv", "jsonl", "txt", "caption"),
                        help="instead of --output: a metadata file, or a text file beside each picture")  # fmt: skip
    parser.add_argument("--captioner", default="auto", help="auto, blip, tagger, clip, or several: blip+clip (auto)")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with the captioner's files")
    parser.add_argument("--download", action="store_true", help="fetch missing weights from huggingface.co")
    parser.add_argument("--mode", choices=("keep", "append", "prepend", "replace"), default="keep",
                        help="what becomes of captions that are there (keep)")  # fmt: skip
    parser.add_argument("--template", default="{caption}",
                        help="the caption, such as '**{caption}**, high quality, detailed'")  # fmt: skip
    parser.add_argument("--trigger", default="", help="trigger word, put first")
    parser.add_argument("--kind", default="", help="style, character, scene or object: what captions leave out")
    parser.add_argument("--keep-all", action="store_true", help="leave nothing out for the kind's sake")
    parser.add_argument("--blacklist", default="", metavar="TAGS", help="tags to leave out, by commas; * is a wildcard")
    parser.add_argument("--replace", action="append", default=[], metavar="TAG=TEXT", help="write TEXT for TAG")
    parser.add_argument("--max-tags", type=int, default=40, help="most parts of a caption (40)")
    parser.add_argument("--threshold", type=float, default=0.35, help="least score of a tag (0.35)")
    parser.add_argument("--character-threshold", type=float, default=0.6, help="the same for characters (0.6)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once (8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda …")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Describe the pictures of a folder. Captions that are there stay, unless --mode says otherwise; what is changed is
    kept in a numbered backup. Nothing is downloaded without --download."""
    with uncollected():
        from lora_trainer.captioning.base import Settings
        from lora_trainer.captioning.postprocess import CaptionOptions
        from lora_trainer.captioning.registry import Sources
        from lora_trainer.dataset.writing import CaptionFolder
        from lora_trainer.run.captioning import CaptionJob, caption_folder
        from lora_trainer.training.precision import resolve

    if options.batch_size < 1:
        raise UserError("--batch-size must be 1 or more.", field="batch_size", remedy="Use 8.")
    for name in ("threshold", "character_threshold"):
        if not 0 <= (score := getattr(options, name)) <= 1:  # NaN is not either
            raise UserError(f"{score} is no score of a tag.", field=name, remedy="Give a number from 0 to 1.")
    output = _output(options)
    job = CaptionJob(
        CaptionFolder(options.input, output=output),
        options.captioner,
        options.mode,
        CaptionOptions(
            template=options.template,
            trigger_word=options.trigger,
            kind=options.kind,
            keep_all=options.keep_all,
            blacklist=tuple(tag.strip() for tag in options.blacklist.split(",") if tag.strip()),
            replacements=_replacements(options.replace),
            max_parts=options.max_tags,
        ),
        Settings(str(resolve(options.device, "no").device), options.threshold, options.character_threshold),
        options.batch_size,
        # Unasked, a metadata file gets no copies: later changes of the text files would not count any more.
        copy_kept=isinstance(output, Path) and bool(options.output or options.format),
    )
    progress = _progress()
    with closing(progress), _cancellable() as cancelled:
        sources = Sources(given=options.weights, download=options.download)
        result = caption_folder(job, sources, callbacks=progress, cancelled=cancelled.is_set)
    if result.kept and not (result.written or result.skipped or result.cancelled):
        again = "; --mode append, prepend or replace describes them again" if options.mode == "keep" else ""
        print(f"All {result.kept} pictures have their caption{again}.")
        return DONE
    place = output if isinstance(output, Path) else f"{options.input}, one {output} file each"
    counts = f"{result.written} captions by {result.captioner}, {result.kept} kept, {len(result.skipped)} left out"
    print(f"{counts}: {place}")
    return INTERRUPTED if result.cancelled else DONE


def _output(options: argparse.Namespace) -> Path | str:
    if options.output is not None:
        return options.output
    if options.format in ("txt", "caption"):
        return f".{options.format}"
    return options.input / f"metadata.{options.format or 'csv'}"


def _replacements(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        tag, equals, text = pair.partition("=")
        if not equals or not tag.strip():
            raise UserError(f"'{pair}' replaces nothing.", field="replace", remedy="Write TAG=TEXT.")
        found[tag.strip()] = text.strip()
    return found


def _progress() -> Any:
    from tqdm import tqdm

    from lora_trainer.run.captioning import CaptionCallbacks

    class Bar(CaptionCallbacks):
        def __init__(self) -> None:
            self._bar: tqdm | None = None

        def on_progress(self, done: int, total: int) -> None:
            if self._bar is None:
                self._bar = tqdm(total=total, desc="captions", unit="picture", file=sys.stderr, dynamic_ncols=True)
            self._bar.update(done - self._bar.n)

        def on_warning(self, text: str) -> None:
            tqdm.write(f"warning: {text}", file=sys.stderr)

        def close(self) -> None:
            if self._bar is not None:
                self._bar.close()

    return Bar()


@contextmanager
def _cancellable() -> Iterator[threading.Event]:
    """The first Ctrl-C ends after this batch, with everything written; a second one at once."""
    asked = threading.Event()

    def on_interrupt(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nStopping after this batch; press Ctrl-C again to end at once.", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
