"""The commands for language models: show what a model sees of its rows, generate with and without a LoRA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_trainer.cli.imports import uncollected
from lora_trainer.errors import UserError

DONE = 0
_LEARNED, _PLAIN = "\x1b[32m", "\x1b[0m"


def add_show(commands: Any) -> None:
    parser = commands.add_parser("show", help="show what a language model sees of its rows", description=show.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the training")
    parser.add_argument("--rows", type=int, default=3, help="how many rows (3)")
    parser.add_argument("--from-row", type=int, default=1, help="the first of them (1)")
    parser.set_defaults(run=show)


def show(options: argparse.Namespace) -> int:
    """Print rows as the model reads them, special tokens included. What is learned is green, or stands between ⟦ and ⟧
    where the output is no terminal."""
    from lora_trainer.config import load
    from lora_trainer.dataset.text.rows import read_rows
    from lora_trainer.run.workloads.text import encoder_for

    config = load(options.config)
    encoder = encoder_for(config)
    rows, _ = read_rows(Path(config.train_data_dir))
    marks = (_LEARNED, _PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    first = max(1, options.from_row)
    for row in rows[first - 1 : first - 1 + max(0, options.rows)]:
        encoded = encoder.encode(row)
        count = sum(encoded.learned)
        cut = f", {encoded.cut} more are cut" if encoded.cut else ""
        print(f"--- {row.where}: {len(encoded)} tokens, {count} learned{cut}")
        print("".join(text if not learned else text.join(marks) for text, learned in encoder.segments(encoded)))
    return DONE


def add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate", help="let a language model answer, without and with a LoRA", description=generate.__doc__
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, help="folder of the LoRA")
    parser.add_argument("--prompt", required=True, help="what the model is asked")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--template", default="auto", help="chat_template of the training (auto)")
    parser.add_argument("--max-tokens", type=int, default=200, help="length of the answer (200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token (0)")
    parser.add_argument("--seed", type=int, default=42, help="for a temperature above 0")
    parser.add_argument("--json-schema", type=Path, help="the answer is JSON of this schema (needs llguidance)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda …")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code from the base's folder")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> int:
    """Print the answer of the base model and, with --adapter, below it that of the base with the LoRA."""
    with uncollected():
        from lora_trainer.config import from_mapping
        from lora_trainer.run.generating import Wish, answers

    config = from_mapping(
        {
            "base_model": str(options.base), "task": "text", "device": options.device, "seed": options.seed,
            "chat_template": options.template, "system_prompt": options.system,
            "trust_remote_code": options.trust_remote_code,
        }
    )  # fmt: skip
    schema = None
    if options.json_schema is not None:
        try:
            schema = options.json_schema.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{options.json_schema} is not UTF-8.", remedy="Give a JSON schema.") from error
    wish = Wish(options.prompt, options.max_tokens, options.temperature, schema)
    for title, text in answers(config, options.adapter, wish):
        print(f"--- {title}\n{text}" if options.adapter else text, flush=True)
    return DONE


PARSERS = (add_show, add_generate)
