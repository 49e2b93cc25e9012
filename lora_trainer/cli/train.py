"""``train``: one run from a YAML file, with a progress bar; Ctrl-C saves the state."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.config import TrainConfig, Translation, load, settings_where, with_folder
from lora_trainer.config.parse import from_own, parse_overrides
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.requirements import import_networks

if TYPE_CHECKING:
    from lora_trainer.training.ranks import Ranks

INTERRUPTED = 130
_ECHO_SECONDS = 5.0
_PATHS = settings_where(lambda facts: facts.path is not None)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train a LoRA", description="Train a LoRA as a YAML file says; settings given here win over it."
    )
    parser.add_argument("--config", type=Path, help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="single settings, such as epochs=3")
    parser.add_argument(
        "--progress", choices=("bar", "json"), default="bar",
        help="how progress is shown; json: one object per line on standard output, for a program",
    )  # fmt: skip
    parser.add_argument(
        "--commands", action="store_true",
        help="read commands from standard input, one word per line: pause, resume, save_now, preview_now, stop, "
        "stop_and_save; its end stops and saves",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except Exception as error:
        if options.progress == "json" and os.environ.get("RANK", "0") == "0":
            from lora_trainer.run.lines import ProgressLines

            ProgressLines(sys.stdout).fail(error)
        raise


def _run(options: argparse.Namespace) -> int:
    if options.config is None and not options.overrides:
        raise UserError("Nothing says what to train.", remedy="Give --config run.yaml, or settings as name=value.")
    path, overrides = options.config, options.overrides
    try:
        config = load(path, overrides, print_report(path)) if path else from_own(parse_overrides(overrides))
    except ConfigError as error:
        with uncollected():  # torch is slow to import
            from lora_trainer.run import with_all_others

        raise with_all_others(error, home_settings(error.config)) or error from None
    if config.gpus and not is_one_of_several():
        count = len(config.gpus)
        print(f"warning: gpus is for the tab; here use torchrun --nproc-per-node {count}.", file=sys.stderr)
    return run_training(home_settings(config), options.progress, options.commands)[0]


def print_report(path: Path) -> Callable[[Translation], None]:
    """Says what became of another tool's settings in this file."""
    return lambda translation: print(translation.to_text(str(path)), file=sys.stderr)


def home_settings(config: TrainConfig) -> TrainConfig:
    """~/pictures in a path is the user's own: no shell has read what stands in the file, or behind an equals sign."""
    paths: dict[str, Any] = {
        name: [with_folder(entry, os.path.expanduser) for entry in value]
        if isinstance(value, list)
        else os.path.expanduser(value)
        for name in _PATHS
        if (value := getattr(config, name))
    }
    return dataclasses.replace(config, **paths)


def run_training(config: TrainConfig, progress: str = "bar", listens: bool = False) -> tuple[int, Any]:
    """Train with a progress bar and print the summary; returns the exit code and the ``Result``. Where a launcher has
    started several such processes, they train one LoRA together, and rank 0 alone says how it goes.

    progress: "bar", or "json" for lines that a program reads. listens: commands are read from standard input.
    """
    with uncollected():  # torch is slow to import: not for --help
        from lora_trainer import run as engine
        from lora_trainer.cli.progress import ProgressBar, Silence
        from lora_trainer.run.lines import ProgressLines, obey
        from lora_trainer.run.workloads import task_of
        from lora_trainer.training.callbacks import TrainCommands

        if task_of(config) != "text":
            import_networks()

    with joined(config) as ranks:
        commands = TrainCommands()
        callbacks: ProgressBar | ProgressLines | Silence = Silence()
        if ranks.leads:
            callbacks = ProgressLines(sys.stdout) if progress == "json" else ProgressBar()
            if listens:
                if isinstance(callbacks, ProgressLines):
                    commands.on_paused = callbacks.paused
                obey(commands)
        try:
            lender = engine.file_lender(config, ranks)
        except UserError as error:
            raise engine.with_all_others(error, config) or error from None

        def stop() -> None:
            commands.stop_and_save()
            ranks.ask_to_stop()

        sentence = "Stopping after this step; the state is saved." if ranks.leads else ""
        stopping = interruptible(stop, sentence, passed_on=ranks.size > 1)
        with closing(callbacks), stopping as interrupted:  # a message is not to end on the bar's line
            result = engine.train(config, lender, callbacks=callbacks, commands=commands, ranks=ranks)
        signalled = any(ranks.meet(bool(interrupted)))  # a signal to one of them stops all
        if isinstance(callbacks, ProgressLines):
            callbacks.end(result, commands.saves_before_stop)
        elif ranks.leads:
            print(engine.summary(result, config.resume))
    return INTERRUPTED if signalled and result.status != "finished" else 0, result


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The processes that this one trains with, each on its own GPU where there are some. Whatever ends this one, the
    others learn why."""
    from lora_trainer.training.ranks import ALONE

    if not is_one_of_several():
        yield ALONE
        return
    from lora_trainer.training.precision import resolve
    from lora_trainer.training.processes import Processes, choose_own_device

    choose_own_device(config.device)
    ranks = Processes(resolve(config.device, config.mixed_precision).device)
    try:
        yield ranks
    except BaseException as error:
        ranks.close(error)
        raise
    ranks.close()


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return "RANK" in environment and int(environment.get("WORLD_SIZE") or 1) > 1


@contextmanager
def interruptible(
    stop: Callable[[], object], sentence: str, passed_on: bool = False
) -> Iterator[list[float]]:
    """The first Ctrl-C, or SIGTERM, calls ``stop``, and says so; a second Ctrl-C ends everything at once. Yields the
    times of both.

    passed_on: a launcher passes signals on, so that one Ctrl-C arrives twice.
    """
    presses: list[float] = []

    def on_signal(signum: int, frame: Any) -> None:
        now = time.monotonic()
        if presses:
            if signum == signal.SIGINT and not (passed_on and now - presses[0] < _ECHO_SECONDS):
                raise KeyboardInterrupt
            return
        presses.append(now)
        if sentence:
            print(f"\n{sentence} Press Ctrl-C again to end at once.", file=sys.stderr)
        stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield presses
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
