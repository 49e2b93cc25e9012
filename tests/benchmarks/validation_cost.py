"""What measuring held-out pictures costs, and the step that is tried first, on the demo's base, in CPU time.

    python -m tests.benchmarks.validation_cost [--steps 40] [--batch 1] [--share 0.1] [name=value ...]

Prints the seconds of a step, of a measurement and of the tried step, and the share that the measurements take of a run
of so many steps where the program chooses the interval.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from lora_trainer import run
from lora_trainer.config.parse import from_own, parse_overrides
from lora_trainer.demo.base import build_base
from lora_trainer.demo.shapes import NEW_SHAPE, write_dataset
from lora_trainer.training.callbacks import TrainCallbacks
from lora_trainer.training.step import TrainingStep
from lora_trainer.training.validation import Validator


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.process_time() - started)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("overrides", nargs="*", metavar="name=value", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "pictures", shape=NEW_SHAPE, side=128, count=options.pictures)
        config = from_own(
            {
                "base_model": str(build_base()),
                "train_data_dir": str(Path(folder) / "pictures"),
                "output_dir": str(Path(folder) / "out"),
                "resolution": 128,
                "epochs": 10_000,
                "max_train_steps": options.steps,
                "batch_size": options.batch,
                "validation_share": options.share,
                "early_stopping": "off",
                "tensorboard": False,
                **parse_overrides(options.overrides),
            }
        )
        steps: list[float] = []
        measurements: list[float] = []
        tried: list[float] = []
        with (
            mock.patch.object(TrainingStep, "__call__", timed(TrainingStep.__call__, steps)),
            mock.patch.object(TrainingStep, "try_out", timed(TrainingStep.try_out, tried)),
            mock.patch.object(Validator, "measure", timed(Validator.measure, measurements)),
        ):
            run.train(config, run.file_lender(config), callbacks=TrainCallbacks())
    step = statistics.median(steps)
    print(f"step {step:.3f} s, tried step {tried[0]:.3f} s = {tried[0] / step:.2f} steps")
    print(f"measurement {statistics.median(measurements):.3f} s = {statistics.median(measurements) / step:.1f} steps")
    share = sum(measurements) / (sum(measurements) + sum(steps))
    print(f"{len(measurements)} measurements in {len(steps)} steps: {share:.1%} of the time")


if __name__ == "__main__":
    main()
