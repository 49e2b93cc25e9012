"""``demo``: the main job with nothing to download."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.cli.train import run_training
from lora_trainer.requirements import import_networks


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="train on an embedded model and drawn pictures", description=run.__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for the results (output/demo)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Teach a small embedded model a shape that it has never seen, and draw it before and after. Needs no weights, no
    GPU and a few minutes."""
    with uncollected():
        from lora_trainer.demo import main as demo

        import_networks()
    config = demo.prepare(options.output)
    code, result = run_training(config)
    if result.status == "finished":
        print(demo.report(config, result.lora))
    return code
