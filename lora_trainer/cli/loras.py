"""The commands on finished LoRAs: resize, combine, extract, convert, edit. Each writes a new file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError

DONE = 0


def add_resize(commands: Any) -> None:
    parser = commands.add_parser("resize", help="write a LoRA with another rank", description=resize.__doc__)
    parser.add_argument("lora", type=Path, metavar="LORA", help="LoRA file (.safetensors)")
    _add_size(parser)
    _add_common(parser)
    parser.set_defaults(run=resize)


def resize(options: argparse.Namespace) -> int:
    """Write the best approximation of a LoRA of a lower rank, or of the rank that keeps a share of its change."""
    from lora_trainer.loras.resize import resize as resize_file

    done = resize_file(options.lora, options.output, rank=options.rank, share=options.share, **_common(options))
    print(f"{done.path}: {done.layers} layers of rank {_span(done.ranks)}, {done.kept:.2%} of the change kept")
    _print_unmatched(done.unmatched)
    return DONE


def add_combine(commands: Any) -> None:
    parser = commands.add_parser("combine", help="write several LoRAs as one", description=combine.__doc__)
    parser.add_argument("loras", nargs="+", metavar="LORA[:STRENGTH]", help="LoRA files, such as style.safetensors:0.7")
    _add_size(parser)
    _add_common(parser)
    parser.set_defaults(run=combine)


def combine(options: argparse.Namespace) -> int:
    """Write one LoRA that does at strength 1 what all the given ones do at theirs: exactly, with the sum of their
    ranks, or at a lower rank that is given."""
    from lora_trainer.loras.combine import combine as combine_files

    loras = [_with_strength(one) for one in options.loras]
    done = combine_files(loras, options.output, rank=options.rank, share=options.share, **_common(options))
    print(f"{done.path}: {done.layers} layers of rank {_span(done.ranks)}")
    _print_unmatched(done.unmatched)
    return DONE


def add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="write what differs in two checkpoints", description=extract.__doc__)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint that was tuned")
    parser.add_argument("--tuned", type=Path, required=True, help="checkpoint that it became")
    parser.add_argument("--rank", type=int, default=32, help="highest rank of a layer (32)")
    parser.add_argument("--conv-rank", type=int, default=0, help="the same for convolutions (0: leave them out)")
    parser.add_argument("--share", type=float, help="share of a layer's change that is enough, such as 0.95")
    _add_output(parser)
    parser.set_defaults(run=extract)


def extract(options: argparse.Namespace) -> int:
    """Write the LoRA that turns one checkpoint into the other, as nearly as its rank allows."""
    from lora_trainer.loras.extract import extract as extract_files

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} layers", end="\n" if done == total else "", file=sys.stderr, flush=True)

    done = extract_files(
        options.base,
        options.tuned,
        options.output,
        rank=options.rank,
        conv_rank=options.conv_rank,
        share=options.share,
        precision=options.precision or "fp16",
        overwrite=options.overwrite,
        on_progress=progress,
    )
    same = f", {done.equal} layers are equal in both" if done.equal else ""
    print(f"{done.path}: {done.layers} layers of rank {_span(done.ranks)}, {done.kept:.2%} of the difference{same}")
    return DONE


def add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="write a LoRA in another layout", description=convert.__doc__)
    parser.add_argument("lora", type=Path, metavar="LORA", help="LoRA file, or a folder of diffusers or PEFT")
    parser.add_argument("--to", required=True, choices=("kohya", "diffusers", "peft"), help="layout to write")
    _add_common(parser)
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> int:
    """Write a LoRA under the names of another program: kohya's for the WebUIs and ComfyUI, diffusers', or PEFT's
    folders."""
    from lora_trainer.loras.convert import convert as convert_file

    layers, left_out = convert_file(options.lora, options.output, options.to, **_common(options))
    print(f"{options.output}: {layers} layers")
    for sentence in left_out:
        print(f"left out: {sentence}")
    return DONE


def add_edit(commands: Any) -> None:
    parser = commands.add_parser("edit", help="write a LoRA with other metadata", description=edit.__doc__)
    parser.add_argument("lora", type=Path, metavar="LORA", help="LoRA file (.safetensors)")
    parser.add_argument("--trigger", help="trigger words, which the WebUI's card offers")
    parser.add_argument("--title", help="title")
    parser.add_argument("--description", help="description")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any entry, as often as needed"
    )
    parser.add_argument("--remove", action="append", default=[], metavar="NAME", help="an entry to drop")
    _add_output(parser, precision=False)
    parser.set_defaults(run=edit)


def edit(options: argparse.Namespace) -> int:
    """Write a LoRA with other metadata and the same weights."""
    from lora_trainer.loras.edit import DESCRIPTION, TITLE, TRIGGER, edit_metadata

    named = {TRIGGER: options.trigger, TITLE: options.title, DESCRIPTION: options.description}
    wanted = {name: value for name, value in named.items() if value is not None}
    for entry in options.set:
        name, separator, value = entry.partition("=")
        if not separator:
            raise UserError(f"{entry!r} has no =.", field="--set", remedy="Write NAME=VALUE.")
        wanted[name] = value
    if not wanted and not options.remove:
        raise UserError(
            "Nothing is to be changed.", remedy="Give --trigger, --title, --description, --set or --remove."
        )
    metadata = edit_metadata(
        options.lora, options.output, set=wanted, remove=options.remove, overwrite=options.overwrite
    )
    print(json.dumps({name: metadata[name] for name in wanted}, ensure_ascii=False, indent=2))
    return DONE


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="highest rank of a layer, such as 8")
    parser.add_argument("--share", type=float, help="share of each layer's change to keep, such as 0.95")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="its base model, where that is not a usual SD 1.5, 2 or SDXL")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument("--output", type=Path, required=True, help="what to write")
    if precision:
        parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="number format of the new file")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {"base": options.base, "precision": options.precision, "overwrite": options.overwrite}


def _with_strength(text: str) -> tuple[str, float]:
    """PATH or PATH:STRENGTH; a drive letter's colon is none of a strength."""
    path, separator, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if separator and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _span(ranks: tuple[int, int]) -> str:
    return f"{ranks[0]}" if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"


def _print_unmatched(names: Sequence[str]) -> None:
    if names:
        print(f"{len(names)} of its layers are not in this base and were left out: {', '.join(names[:5])} …")


PARSERS = (add_resize, add_combine, add_extract, add_convert, add_edit)
