"""``convert-config``: another trainer's settings as a YAML file of ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_trainer.config import from_mapping, read_file, to_yaml
from lora_trainer.config.names import ALIASES
from lora_trainer.errors import UserError
from lora_trainer.files import atomic_write


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert-config", help="turn another trainer's settings into a YAML file", description=run.__doc__
    )
    parser.add_argument("input", type=Path, metavar="IN",
                        help="kohya GUI .json, sd-scripts .toml, ai-toolkit .yaml, OneTrainer .json")  # fmt: skip
    parser.add_argument("output", type=Path, metavar="OUT.yaml", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.yaml if it exists")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Say which settings of another trainer are taken, which mean nothing here and which cannot be honored; write
    those that are taken, under our names, with that report above them."""
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists.", remedy="Give another name, or --overwrite.")
    values, translation = read_file(options.input)
    config = from_mapping(values)
    report = translation.to_text(options.input.name) if translation else f"{options.input.name}: settings of our own."
    comment = "\n".join(f"# {line}" for line in report.splitlines())
    atomic_write(options.output, f"{comment}\n\n{to_yaml(config, {ALIASES.get(name, name) for name in values})}")
    print(f"{report}\nWritten: {options.output}")
    return 0
