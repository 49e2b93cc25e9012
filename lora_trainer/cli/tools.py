"""The commands that look at files, or make one from others: check, info, merge."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

DONE, STOPS_TRAINING = 0, 2


def add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="report on a folder of pictures", description=check.__doc__)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with pictures and captions")
    parser.add_argument("--resolution", type=int, default=512, help="side in pixels to train at (512)")
    parser.add_argument("--trigger", default="", help="trigger word that every caption should have")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    """Look for damaged, small, blurred or duplicate pictures and for faulty captions. Exit code 2 when something
    found would stop a training."""
    from lora_trainer.config import parse_resolution
    from lora_trainer.dataset.checks import check_folder

    if parse_resolution(str(options.resolution)) is None:
        remedy = "Give a side from 64 to 8192, such as 512."
        raise UserError(f"{options.resolution} is no size to train at.", field="resolution", remedy=remedy)
    report = check_folder(options.dataset, resolution=options.resolution, trigger_word=options.trigger)
    print(json.dumps(report.to_json(), ensure_ascii=False, indent=2) if options.json else report.to_text())
    return STOPS_TRAINING if report.stops_training else DONE


def add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="say what a LoRA file is", description=info.__doc__)
    parser.add_argument("lora", type=Path, metavar="LORA", help="LoRA file (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print it as JSON, with all metadata")
    parser.add_argument("--blocks", action="store_true", help="add how strongly each block of the model is changed")
    parser.add_argument("--base", type=Path, help="its base model for --blocks, where that is not a usual one")
    parser.set_defaults(run=info)


def info(options: argparse.Namespace) -> int:
    """Kind, rank, layers, base model, trigger word and training of a LoRA, and whether it does anything."""
    from lora_trainer.adapters.describe import describe
    from lora_trainer.adapters.lora_file import read_lora

    description = describe(options.lora)
    facts = dataclasses.asdict(description)
    if options.blocks:
        from lora_trainer.loras.strength import bars, strength_by_block

        facts["blocks"] = strength_by_block(options.lora, options.base)
    if options.json:
        facts["metadata"] = read_lora(options.lora).metadata
        print(json.dumps(facts, ensure_ascii=False, indent=2, default=str))
        return DONE
    for name, value in facts.items():
        if value not in (None, (), {}) and name not in ("problems", "blocks"):
            print(f"{name.replace('_', ' ') + ':':<16}{_words(value)}")
    for problem in description.problems:
        print(f"problem:        {problem}")
    if options.blocks:
        print(*bars(facts["blocks"]), sep="\n")
    return DONE


def add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="merge a LoRA into a checkpoint", description=merge.__doc__)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint (.safetensors)")
    parser.add_argument("--lora", type=Path, required=True, help="LoRA file (.safetensors)")
    parser.add_argument("--weight", type=float, default=1.0, help="strength of the LoRA (1.0)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write (.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.set_defaults(run=merge)


def merge(options: argparse.Namespace) -> int:
    """Write a checkpoint that draws like the base with the LoRA at this strength. Neither input is changed."""
    from lora_trainer.adapters.lora_file import read_lora
    from lora_trainer.adapters.merge import merge as merge_files
    from lora_trainer.models.checkpoint import FileLender
    from lora_trainer.models.families import refuse_other_family, targets_of

    architecture = FileLender(options.base).architecture()
    lora = read_lora(options.lora)
    refuse_other_family(lora.metadata, options.lora, architecture.family)
    result = merge_files(
        options.base,
        lora,
        options.weight,
        options.output,
        targets=targets_of(architecture),
        overwrite=options.overwrite,
    )
    print(f"{result.path}: {result.merged} layers merged at strength {options.weight:g}")
    if result.unmatched:
        print(f"{len(result.unmatched)} of the LoRA's layers are not in this base: {', '.join(result.unmatched[:5])} …")
    for note in result.notes:
        print(note)
    return DONE


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} × {count}" for key, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


PARSERS = (add_check, add_info, add_merge)
