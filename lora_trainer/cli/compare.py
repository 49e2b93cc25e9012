"""``compare``: the pictures of a run's LoRAs in a grid."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lora_trainer.cli.imports import uncollected
from lora_trainer.errors import UserError
from lora_trainer.requirements import import_networks

DONE = 0
Number = TypeVar("Number", int, float)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help="draw saved steps by weights by prompts", description=run.__doc__)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="output folder of a run, or its .config.yaml")
    parser.add_argument("--weights", help="weights of the LoRA (0.5,0.8,1)")
    parser.add_argument("--steps", help="saved steps, such as 200,400 (all; eight of more than that)")
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="what to draw (the run's preview prompts)")
    parser.add_argument("--base", type=Path, help="base model, where it is not the one that the run names")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (the run's)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw every saved LoRA of a run at several weights, the base model in the first column, with the same noise, into
    RUN/compare: one picture with labels, and each by itself. Ctrl-C keeps what was drawn up to then."""
    with uncollected():
        from lora_trainer.cli.train import INTERRUPTED, interruptible
        from lora_trainer.comparison.drawing import draw
        from lora_trainer.comparison.plan import Wish, make_plan
        from lora_trainer.comparison.runs import find_run, saved_loras
        from lora_trainer.host.standalone import StandaloneHost
        from lora_trainer.jobs.execution import drawing_options
        from lora_trainer.run.workloads import task_of
        from lora_trainer.run_files import GRID

        import_networks()

    wish = Wish(_numbers(options.steps, int, "steps"), _numbers(options.weights, float, "weights"), options.prompts)
    folder, config = find_run(options.run_folder)
    if task_of(config) == "text":
        raise UserError("This run taught a language model.", field="run", remedy="Use generate to see its answers.")
    given = {"base_model": options.base and str(options.base), "device": options.device}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value})
    host = StandaloneHost(folder, device=config.device)
    lending = drawing_options(host, config)
    info = host.lender(config.base_model, lending).describe()
    plan = make_plan(config, saved_loras(folder, config.output_name), info, wish)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty() or done in (0, total):
            print(f"\r{done}/{total} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)

    with interruptible(lambda: None, "Stopping after this picture.") as stopped:
        made = draw(host, plan, folder, lending, on_progress=progress, stopped=lambda: bool(stopped))
    if made is not None:
        print(made / GRID)
    return INTERRUPTED if stopped else DONE


def _numbers(text: str | None, kind: Callable[[str], Number], field: str) -> list[Number] | None:
    if text is None:
        return None
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(kind(part.strip()))
        except ValueError:
            raise UserError(f"{part.strip()!r} is no number.", field=field, remedy="Separate them by commas.") from None
    return numbers
