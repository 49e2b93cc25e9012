"""``train``: one run from a YAML file, with a progress bar; Ctrl-C saves the state."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lora_trainer.config import TrainConfig, Translation, load, settings_where, with_folder
from lora_trainer.config.parse import from_own, parse_overrides
from lora_trainer.errors import ConfigError, UserError

INTERRUPTED = 130
_PATHS = settings_where(lambda facts: facts.path is not None)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train", help="train a LoRA", description="Train a LoRA as a YAML file says; settings given here win over it."
    )
    parser.add_argument("--config", type=Path, help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="single settings, such as epochs=3")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.config is None and not options.overrides:
        raise UserError("Nothing says what to train.", remedy="Give --config run.yaml, or settings as name=value.")
    path, overrides = options.config, options.overrides
    try:
        config = load(path, overrides, print_report(path)) if path else from_own(parse_overrides(overrides))
    except ConfigError as error:
        from lora_trainer.run import with_all_others  # torch is slow to import

        raise with_all_others(error, home_settings(error.config)) or error from None
    return run_training(home_settings(config))[0]


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


def run_training(config: TrainConfig) -> tuple[int, Any]:
    """Train with a progress bar and print the summary; returns the exit code and the ``Result``."""
    from lora_trainer import run as engine  # torch is slow to import: not for --help
    from lora_trainer.cli.progress import ProgressBar
    from lora_trainer.training.callbacks import TrainCommands

    commands = TrainCommands()
    progress = ProgressBar()
    try:
        lender = engine.file_lender(config)
    except UserError as error:
        raise engine.with_all_others(error, config) or error from None
    stopping = interruptible(commands.stop_and_save, "Stopping after this step; the state is saved.")
    with closing(progress), stopping as interrupted:  # a message is not to end on the bar's line
        result = engine.train(config, lender, callbacks=progress, commands=commands)
    print(engine.summary(result, config.resume))
    return INTERRUPTED if interrupted and result.status != "finished" else 0, result


@contextmanager
def interruptible(stop: Callable[[], object], sentence: str) -> Iterator[list[float]]:
    """The first Ctrl-C calls ``stop``, and says so; a second one ends everything at once. Yields the times of both."""
    presses: list[float] = []

    def on_interrupt(signum: int, frame: Any) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(time.monotonic())
        print(f"\n{sentence} Press Ctrl-C again to end at once.", file=sys.stderr)
        stop()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, previous)
