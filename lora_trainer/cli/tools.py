"""The commands that look at files, or make one from others: check, info, merge."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.errors import ConfigError, Problem, UserError

DONE, STOPS_TRAINING = 0, 2


def add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="report on pictures, or on rows of text", description=check.__doc__)
    parser.add_argument("dataset", type=Path, metavar="DATASET", nargs="?",
                        help="folder with pictures and captions, or .jsonl or .json with rows")  # fmt: skip
    parser.add_argument("--config", type=Path, help="instead: YAML file of a training, with all that it names")
    parser.add_argument("--resolution", type=int, default=512, help="side in pixels to train at (512)")
    parser.add_argument("--trigger", default="", help="trigger word that every caption should have")
    parser.add_argument("--base", type=Path, help="rows: folder of the language model, to count tokens")
    parser.add_argument("--max-length", type=int, default=1024, help="rows: most tokens of a row (1024)")
    parser.add_argument("--held-out", type=Path, help="rows: those to test with, which must not be trained")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    """Look for damaged, small, blurred or duplicate pictures and for faulty captions; for malformed, duplicate, too
    long and leaking rows; with --config, for wrong settings and a base model that cannot be trained, too. Exit code 2
    when something found would stop a training."""
    if options.config:
        return _check_training(options)
    if options.dataset is None:
        raise UserError("Nothing says what to check.", remedy="Give a folder with pictures, or --config run.yaml.")
    if options.dataset.is_file() or options.base or options.held_out:
        return _check_rows(options)
    from lora_trainer.config import parse_resolution
    from lora_trainer.dataset.checks import check_folder

    if parse_resolution(str(options.resolution)) is None:
        remedy = "Give a side from 64 to 8192, such as 512."
        raise UserError(f"{options.resolution} is no size to train at.", field="resolution", remedy=remedy)
    report = check_folder(options.dataset, resolution=options.resolution, trigger_word=options.trigger)
    print(json.dumps(report.to_json(), ensure_ascii=False, indent=2) if options.json else report.to_text())
    return STOPS_TRAINING if report.stops_training else DONE


def _check_training(options: argparse.Namespace) -> int:
    """The settings, the base model and the data of a training, in one report."""
    with uncollected():
        from lora_trainer.cli.train import home_settings, print_report
        from lora_trainer.config import Problems, load, parse_resolution
        from lora_trainer.dataset.checks import check_folder
        from lora_trainer.dataset.text.checks import check_rows
        from lora_trainer.run import with_all_others
        from lora_trainer.run.workloads import task_of
        from lora_trainer.run.workloads.text import encoder_for

    found: UserError | None = None
    try:
        config = load(options.config, (), print_report(options.config))
    except ConfigError as error:
        found, config = error, error.config
        if config is None:
            raise
    config = home_settings(config)
    problems = Problems(with_all_others(found, config))
    report: Any = None
    if not problems.concern("train_data_dir", "task") and config.train_data_dir:
        if task_of(config) == "text" or Path(config.train_data_dir).is_file():
            encoder = None if problems.concern("base_model", "chat_template") else encoder_for(config)
            report = check_rows(Path(config.train_data_dir), held_out=options.held_out, encoder=encoder)
        else:
            side = parse_resolution(config.resolution)
            side = side if isinstance(side, tuple) else options.resolution
            report = check_folder(config.train_data_dir, resolution=side, trigger_word=config.trigger_word)
    if options.json:
        told = [Problem.of(problem).to_dict() for problem in problems.found]
        print(json.dumps({**(report.to_json() if report else {}), "problems": told}, ensure_ascii=False, indent=2))
    else:
        for problem in problems.found:
            print(f"error:   {problem}")
        print(report.to_text() if report else "")
    stops = problems.found or report is None or report.stops_training
    return STOPS_TRAINING if stops else DONE


def _check_rows(options: argparse.Namespace) -> int:
    from lora_trainer.config import from_mapping
    from lora_trainer.dataset.text.checks import check_rows
    from lora_trainer.run.workloads.text import encoder_for

    encoder = None
    if options.base:
        settings = {"base_model": str(options.base), "max_length": options.max_length, "task": "text"}
        encoder = encoder_for(from_mapping(settings))
    report = check_rows(options.dataset, held_out=options.held_out, encoder=encoder)
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
    parser.add_argument("--base", type=Path, required=True, help="checkpoint, or a language model's folder")
    parser.add_argument("--lora", type=Path, required=True, help="LoRA file (.safetensors)")
    parser.add_argument("--weight", type=float, default=1.0, help="strength of the LoRA (1.0)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint (.safetensors), or folder, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.set_defaults(run=merge)


def merge(options: argparse.Namespace) -> int:
    """Write a model that works like the base with the LoRA at this strength. Neither input is changed."""
    with uncollected():
        from lora_trainer.adapters.lora_file import read_lora
        from lora_trainer.adapters.merge import merge as merge_files
        from lora_trainer.models.checkpoint import FileLender
        from lora_trainer.models.families import refuse_other_family, targets_of
        from lora_trainer.models.families.causal_lm.folder import is_language_model

    if is_language_model(options.base):
        return _merge_language_model(options)
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


def _merge_language_model(options: argparse.Namespace) -> int:
    from lora_trainer.adapters.merge_folder import merge_folder

    result = merge_folder(options.base, options.lora, options.weight, options.output)
    print(f"{result.path}: {result.merged} layers merged at strength {options.weight:g}")
    print(f"For llama.cpp: python convert_hf_to_gguf.py {result.path}")
    return DONE


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} × {count}" for key, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


PARSERS = (add_check, add_info, add_merge)
