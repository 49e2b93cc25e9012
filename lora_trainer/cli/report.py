"""``report``: a finished run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("report", help="write a run as one HTML page", description=run.__doc__)
    parser.add_argument("run_folder", type=Path, metavar="RUN",
                        help="output folder of a run, its .config.yaml or its LoRA")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (RUN/NAME.report.html)")
    parser.add_argument("--language", default="en", help="en, or a localization of the page, such as zh_CN (en)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write settings, curves, previews, data set, files and environment of a run as one HTML page that needs nothing
    else and names no place of this machine."""
    with uncollected():
        from lora_trainer.report import RunFolder, report_of
        from lora_trainer.report.words import find, languages

    if options.language != "en" and find(options.language) is None:
        known = ", ".join(["en", *languages()])
        raise UserError(f"There is no language {options.language}.", field="--language", remedy=f"One of {known}.")
    folder = RunFolder(options.run_folder)
    path = options.out or folder.directory / f"{folder.name}.report.html"
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} exists.", field="--out", remedy="Name another file, or give --overwrite.")
    atomic_write(path, report_of(folder, options.language))
    print(path)
    return 0
