"""``supervise``: starts a command, such as torchrun with a training, again when it has failed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

_CODES = "LORA_TRAINER_EXIT_CODES"
"""Names a folder in which each process leaves its exit code: a launcher's own says only that something failed."""
_DONE, _BAD_INPUT, _INTERRUPTED = 0, 2, 130


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "supervise",
        help="start a training again when it fails",
        description="Run a command, and run it again when it fails, unless it would fail again. Example: "
        "python -m lora_trainer supervise --restarts 3 -- torchrun --nproc-per-node 2 -m lora_trainer train "
        "--config run.yaml",
    )
    parser.add_argument("--restarts", type=int, default=3, help="how often at most (default: 3)")
    parser.add_argument("--wait", type=float, default=5.0, help="seconds before each (default: 5)")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from lora_trainer.cli.train import interruptible

    command = options.command_line[1:] if options.command_line[:1] == ["--"] else options.command_line
    if not command:
        raise UserError("Nothing says what to run.", remedy="Give the command behind --.")
    child: list[subprocess.Popen] = []

    def stop() -> None:
        if child and sys.platform != "win32":  # there the console has told it, and terminate would kill it
            child[-1].terminate()

    with interruptible(stop, "Stopping the command; it is not started again.", passed_on=True) as stopped:
        for restart in range(options.restarts + 1):
            code = _once(command, child)
            if stopped and code not in (_DONE, _BAD_INPUT):
                return _INTERRUPTED
            if stopped or code in (_DONE, _BAD_INPUT, _INTERRUPTED) or restart == options.restarts:
                return 1 if code < 0 else code  # negative: a signal has ended it
            left = f"{restart + 1} of {options.restarts}"
            print(f"The command failed (exit code {code}); it is started again ({left}).", file=sys.stderr, flush=True)
            time.sleep(options.wait)
            if stopped:
                break
    return _INTERRUPTED


def _once(command: list[str], child: list[subprocess.Popen]) -> int:
    """The exit code of the command, or what the processes that it started have left behind."""
    with tempfile.TemporaryDirectory(prefix="lora-trainer-") as folder:
        try:
            process = subprocess.Popen(command, env={**os.environ, _CODES: folder})
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started: {error.strerror}.") from error
        child.append(process)
        code = process.wait()
        codes = {int(path.read_text(encoding="ascii") or 1) for path in Path(folder).iterdir()}
    if code == _DONE or not codes:
        return code
    return next((one for one in (_BAD_INPUT, _INTERRUPTED) if one in codes), 1)


def leave_exit_code(code: int) -> None:
    """For whoever supervises this process; nothing where nobody does."""
    folder = os.environ.get(_CODES)
    if folder and "RANK" in os.environ:
        (Path(folder) / f"{os.environ['RANK']}").write_text(str(code), encoding="ascii")
