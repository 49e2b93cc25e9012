"""What LoRAs that learn a change do to the demo's base, scored on pictures of scenes that no training showed.

    python -m tests.benchmarks.changes words      circles become squares at weight 1, and squares circles at -1
    python -m tests.benchmarks.changes erase      circles are erased, other shapes stay
    python -m tests.benchmarks.changes pair       one pair of pictures: the same scene with another shape
    python -m tests.benchmarks.changes copier     the same pair, learned in two passes
    python -m tests.benchmarks.changes ordinary   the same two pictures and caption, learned as any other pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.demo import shapes
from lora_trainer.demo.base import build_base
from lora_trainer.demo.main import SAMPLING_STEPS, SIDE
from lora_trainer.demo.score import score
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.run import file_lender, train
from tests.benchmarks.unseen import Asked, draw

TEMPLATES = [
    f"a {size} {color} {{}} on a {background} background"
    for color, background in shapes.color_pairs()
    if (color, background) not in shapes.held_out_pairs()
    for size in shapes.SIZES
]
"""The base's captions, less the colors of the pictures that are scored."""
WORDS = {
    "task": "words", "lora_rank": 4, "alpha": 8, "max_train_steps": 300, "learning_rate": 2e-3, "batch_size": 4,
    "original_prompt": "circle", "prompt_templates": TEMPLATES,
}  # fmt: skip
PAIR = {"task": "pair", "lora_rank": 4, "alpha": 1, "max_train_steps": 100, "learning_rate": 5e-3, "min_timestep": 500}
TWO_PICTURES = {"lora_rank": 16, "alpha": 16, "max_train_steps": 100, "learning_rate": 2e-3}
KINDS = {
    "words": {**WORDS, "target_prompt": "square", "both_ways": True},
    "erase": {**WORDS, "protected_prompts": list(shapes.KNOWN_SHAPES[1:])},
    "pair": PAIR,
    "copier": {**TWO_PICTURES, "task": "pair", "pair_method": "copier", "copy_steps": 100},
    "ordinary": {**TWO_PICTURES, "task": "image"},
}  # fmt: skip
SCENE = shapes.Scene("circle", "red", "grey", "big")


def write_pair(folder: Path) -> Path:
    """A circle, and a square in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in (("a", "circle"), ("a_after", "square")):
        shapes.draw(replace(SCENE, shape=shape), SIDE).save(folder / f"{name}.png")
    return folder


def settings(kind: str, folder: Path, changes: Sequence[str]) -> TrainConfig:
    values = {
        "base_model": str(build_base()), "output_dir": str(folder / kind), "output_name": kind, "resolution": SIDE,
        "overwrite": True, "resume": "never", "tensorboard": False, **KINDS[kind],
    }  # fmt: skip
    if kind in ("pair", "copier", "ordinary"):
        caption = shapes.plain_caption(SCENE)
        values |= {"train_data_dir": str(write_pair(folder / "pictures")), "default_caption": caption}
    return from_mapping({**values, **dict(change.split("=", 1) for change in changes)})


def measure(
    config: TrainConfig, lora: Path, prompted: Sequence[str], weights: Sequence[float], count: int, steps: int
) -> None:
    """Percent of the pictures of each prompted shape that show each shape, and how many keep color and background.

    steps: of the sampler."""
    names = shapes.KNOWN_SHAPES
    with FileLender(config.base_model).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config).eval()
        if problems := init_from(adapters, read_lora(lora)):
            raise SystemExit(" ".join(problems))
        with adapters:
            for shape in prompted:
                asked = Asked.of((shape,), count)
                for weight in weights:
                    adapters.multiplier = weight
                    seen = [score(picture, names) for picture in draw(model, asked, steps)]
                    shown = {one: 100 * sum(found.shape == one for found in seen) / len(seen) for one in names}
                    kept = sum(
                        (found.color, found.background) == (scene.color, scene.background)
                        for found, scene in zip(seen, asked.scenes)
                    )
                    said = ", ".join(f"{one} {share:.0f} %" for one, share in shown.items() if share >= 3)
                    colors = f"colors kept {100 * kept / len(seen):.0f} %"
                    print(f"{shape:>8} at {weight:+.2f}: {said}; {colors}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("output/changes"))
    parser.add_argument("--count", type=int, default=64, help="pictures of each shape and weight")
    parser.add_argument("--weights", default="-1,0,1")
    parser.add_argument("--shapes", default=",".join(shapes.KNOWN_SHAPES), help="those that are prompted")
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="of the sampler")
    parser.add_argument("--threads", type=int)
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_intermixed_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = settings(options.kind, options.folder, options.settings)
    result = train(config, file_lender(config))
    assert result.lora is not None
    print(f"{options.kind}: {result.total_steps} steps, {result.seconds:.0f} s, loss {result.loss:.5f}")
    weights = [float(one) for one in options.weights.split(",")]
    measure(config, result.lora, options.shapes.split(","), weights, options.count, options.steps)


if __name__ == "__main__":
    main()
