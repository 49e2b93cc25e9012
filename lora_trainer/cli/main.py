"""The parser, and what an error becomes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from lora_trainer import __version__
from lora_trainer.cli import caption, demo, tools, train, ui
from lora_trainer.errors import UserError

FAILED, BAD_INPUT = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console or LANG=C cannot print every file name; a name must never end a training.
        stream.reconfigure(errors="replace")
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return train.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug, told as one
        traceback.print_exc()
        print(f"unexpected error: {error}\nThis is a bug; please report it with the lines above.", file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_trainer", description="Train a LoRA from a folder of pictures, and handle LoRA files."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (train.add_parser, caption.add_parser, *tools.PARSERS, demo.add_parser, ui.add_parser):
        add(commands)
    return parser
