"""How well the demo's LoRA learned its shape, and what it cost of what the base knew.

    python -m tests.benchmarks.score_demo output/demo/star.safetensors

Draws every prompt with the base alone and with the LoRA, same seed, in color and background pairs that were kept out
of the LoRA's training, and reads the pictures with ``lora_trainer.demo.score``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_trainer.demo.evaluate import accuracy, prompts
from lora_trainer.demo.main import compare, prepare
from lora_trainer.demo.shapes import KNOWN_SHAPES, NEW_SHAPE, held_out_pairs, plain_caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="in the folder that the demo wrote")
    parser.add_argument("--count", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    config = prepare(options.lora.parent)
    for title, names in ((f"the new shape ({NEW_SHAPE})", (NEW_SHAPE,)), ("the known shapes", KNOWN_SHAPES)):
        scenes = prompts(options.count, options.seed, names, held_out_pairs())
        drawn = compare(config, options.lora, [plain_caption(scene) for scene in scenes], seed=options.seed)
        print(title)
        print("  base alone    ", accuracy([pair.before for pair in drawn], scenes))
        print("  with the LoRA ", accuracy([pair.after for pair in drawn], scenes), flush=True)


if __name__ == "__main__":
    main()
