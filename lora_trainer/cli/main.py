"""The parser, and what an error becomes."""

from __future__ import annotations

import argparse
import errno
import io
import sys
import traceback
from collections.abc import Sequence

from lora_trainer import __version__
from lora_trainer.cli import caption, compare, convert, demo, loras, report, supervise, text, tools, train, ui
from lora_trainer.errors import RankFailedError, UserError
from lora_trainer.requirements import missing_package

FAILED, BAD_INPUT = 1, 2
_SYSTEM_SAYS_NO = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EIO, errno.ELOOP}
"""Errors about a path that no program can foresee; each of them names the path."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console or LANG=C cannot print every file name; a name must never end a training.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    options = build_parser().parse_args(arguments)
    code = _run(options)
    supervise.leave_exit_code(code)
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        return options.run(options)
    except (UserError, RankFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return train.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except ModuleNotFoundError as error:
        if (message := missing_package(error)) is None:
            return _unexpected(error)
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if error.errno not in _SYSTEM_SAYS_NO or not error.filename:
            return _unexpected(error)
        print(f"error: {error.filename}: {error.strerror}. Check the path and its permissions.", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug, reported as one
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    traceback.print_exception(error)
    print(f"unexpected error: {error}\nThis is a bug; please report it with the lines above.", file=sys.stderr)
    return FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_trainer", description="Train a LoRA from a folder of pictures, and handle LoRA files."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first, last = (train, supervise, convert, caption), (compare, report, demo, ui)
    several = (*tools.PARSERS, *text.PARSERS, *loras.PARSERS)
    for add in (*(one.add_parser for one in first), *several, *(one.add_parser for one in last)):
        add(commands)
    return parser
