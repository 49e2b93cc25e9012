"""What LoRAs that learn a change do to the demo's base, scored on pictures of scenes that no training showed.

    python -m tests.benchmarks.changes                    every kind below, a row of a table for each
    python -m tests.benchmarks.changes words erase        circles become squares and back at -1; circles are erased
    python -m tests.benchmarks.changes folders            16 squares against 16 circles
    python -m tests.benchmarks.changes pair_color         one pair of pictures that differ in color, shape or outline;
    python -m tests.benchmarks.changes copier_color       the same, learned in two passes;
    python -m tests.benchmarks.changes ordinary_color     the same two pictures, learned as any other pictures
    python -m tests.benchmarks.changes words --count 16 max_train_steps=100
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.demo import evaluate, shapes
from lora_trainer.demo.base import build_base
from lora_trainer.demo.main import SAMPLING_STEPS, SIDE
from lora_trainer.demo.score import nearest, score
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
    "task": "words", "lora_rank": 4, "alpha": 8, "max_train_steps": 200, "learning_rate": 2e-3, "batch_size": 4,
    "original_prompt": "circle", "prompt_templates": TEMPLATES,
}  # fmt: skip
TWO_PICTURES = {"lora_rank": 16, "alpha": 16, "max_train_steps": 100, "learning_rate": 2e-3}
OTHERS = shapes.KNOWN_SHAPES[1:]
BY_WORDS = {
    "words": {**WORDS, "target_prompt": "square", "both_ways": True, "target_modules": ["attn2"], "guidance": 2},
    "erase": {
        **WORDS, "protected_prompts": list(OTHERS), "protected_batches": 3, "guidance": 1.25, "max_train_steps": 400,
    },
}
BY_PAIR = {
    "pair": {
        "task": "pair", "lora_rank": 4, "alpha": 1, "max_train_steps": 100, "learning_rate": 5e-3,
        "min_timestep": 500,
    },
    "copier": {**TWO_PICTURES, "task": "pair", "pair_method": "copier", "copy_steps": 100},
    "ordinary": {**TWO_PICTURES, "task": "image"},
}  # fmt: skip
PAIR_COLOR = {
    "alpha": 4, "pair_weight": 0.7, "max_train_steps": 120, "batch_size": 4, "repeats": 4, "min_timestep": 0,
    "caption_dropout": 0.5, "target_modules": ["attn2"],
}  # fmt: skip
"""For a pair of another color, beside that: the prompt, which names the old one, pulls back at every noise level, and
guidance multiplies what the LoRA does with the prompt but not without."""
PAIR_SHAPE = {"min_scale": 0.5, "pair_mask": True, "saved_strength": 2, "batch_size": 4, "repeats": 4}
"""For a pair of another shape, beside that: the pair is big, and small shapes are to change, too."""
FOLDERS = {
    "task": "slider", "lora_rank": 4, "alpha": 4, "max_train_steps": 500, "learning_rate": 2e-4, "batch_size": 1,
}  # fmt: skip
"""As the page's preset has it."""
SCENE = shapes.Scene("circle", "red", "grey", "big")
Pairs = Sequence[tuple[str, str]]
INK = "black"
DARKER = 25
"""How much darker an outline is than what lies on both sides of it, of 255: latents blur it."""


@dataclass(frozen=True)
class Look:
    """What a picture shows. outlined: its shape has an outline in ``INK``."""

    shape: str | None
    color: str
    background: str
    outlined: bool = False


def outlined(scene: shapes.Scene) -> Image.Image:
    """The scene with an outline, as wide as one latent."""
    drawn = shapes.draw(replace(scene, color=INK), SIDE)
    inner = shapes.draw_mask(replace(scene, radius=scene.radius - 8 / SIDE), SIDE)
    drawn.paste(shapes.COLORS[scene.color], (0, 0, SIDE, SIDE), inner)
    return drawn


def look(picture: Image.Image) -> Look:
    """What is seen, by the demo's scorer. Outlines are no part of a shape's color: the middle of it tells that."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    found = score(picture, shapes.KNOWN_SHAPES)
    distance = np.linalg.norm(pixels - shapes.BACKGROUNDS[found.background], axis=-1)
    there = Image.fromarray(((distance > shapes.MIN_CONTRAST / 2) * 255).astype(np.uint8))
    inner = np.asarray(there.filter(ImageFilter.MinFilter(31))) > 0
    light, rim = pixels.mean(-1), (np.asarray(there) > 0) & ~inner
    if found.shape is None or not inner.any() or not rim.any():
        return Look(found.shape, found.color or "", found.background)
    paint = np.median(pixels[inner], axis=0)
    if np.quantile(light[rim], 0.25) > min(paint.mean(), np.median(light[:4])) - DARKER:
        return Look(found.shape, found.color or "", found.background)
    color = nearest(paint, shapes.COLORS)
    silhouette = Image.composite(Image.new("RGB", picture.size, "white"), Image.new("RGB", picture.size), there)
    return Look(score(silhouette, shapes.KNOWN_SHAPES).shape, color, found.background, True)


@dataclass(frozen=True)
class Question:
    """Pictures of ``shape`` are asked for at a weight of the LoRA, with these colors and backgrounds.

    asked: of what is seen and what was prompted, whether the change is there. kept: whether the rest is as it was.
    """

    shape: str
    weight: float
    says: str
    asked: Callable[[Look, shapes.Scene], bool]
    kept: Callable[[Look, shapes.Scene], bool]
    pairs: Pairs = tuple(shapes.held_out_pairs())


def same_colors(seen: Look, scene: shapes.Scene) -> bool:
    return (seen.color, seen.background) == (scene.color, scene.background)


def turned(shape: str, weight: float, into: str) -> Question:
    return Question(shape, weight, f"{shape} to {into} at {weight:g}", lambda seen, _: seen.shape == into, same_colors)


QUESTIONS = {
    "words": [turned("circle", 1, "square"), turned("square", -1, "circle")],
    "folders": [turned("circle", 1, "square"), turned("square", -1, "circle")],
    "erase": [
        Question("circle", 1, "circle is gone", lambda seen, _: seen.shape != "circle", same_colors),
        *(Question(one, 1, f"{one} stays", lambda seen, scene: seen.shape == scene.shape, same_colors)
          for one in OTHERS),
    ],
    "shape": [turned("circle", 1, "square")],
    "color": [
        Question(
            "circle", 1, "red to blue",
            lambda seen, _: seen.color == "blue",
            lambda seen, scene: (seen.shape, seen.background) == (scene.shape, scene.background),
            [pair for pair in shapes.color_pairs() if pair[0] == SCENE.color and pair[1] != SCENE.background],
        )
    ],
    "outline": [
        Question(
            "circle", 1, "gets an outline",
            lambda seen, _: seen.outlined,
            lambda seen, scene: seen.shape == scene.shape and same_colors(seen, scene),
            [pair for pair in shapes.held_out_pairs() if INK not in pair and pair[1] != "navy"],
        )
    ],
}  # fmt: skip
"""By what is learned. Outlines in black are not seen on navy."""
AFTER = {
    "shape": shapes.draw(replace(SCENE, shape="square"), SIDE),
    "color": shapes.draw(replace(SCENE, color="blue"), SIDE),
    "outline": outlined(SCENE),
}
KINDS = [*BY_WORDS, "folders", *(f"{method}_{change}" for change in AFTER for method in BY_PAIR)]


def write_folder(folder: Path, shape: str) -> Path:
    """The same 16 scenes for each shape, none of which the captions name."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair in shapes.color_pairs() if pair not in shapes.held_out_pairs()]
    for index, scene in enumerate(evaluate.prompts(16, 0, ("circle",), pairs)):
        shapes.draw(replace(scene, shape=shape), SIDE).save(folder / f"{index:02}.png")
        caption = shapes.plain_caption(scene).replace("circle", "shape")
        (folder / f"{index:02}.txt").write_text(caption, encoding="utf-8")
    return folder


def settings(kind: str, folder: Path, changes: Sequence[str]) -> TrainConfig:
    method, _, change = kind.partition("_")
    values = {
        "base_model": str(build_base()), "output_dir": str(folder / kind), "output_name": kind, "resolution": SIDE,
        "overwrite": True, "resume": "never", "tensorboard": False,
        **{**BY_WORDS, **BY_PAIR, "folders": FOLDERS}[method],
    }  # fmt: skip
    values |= {"pair_color": PAIR_COLOR, "pair_shape": PAIR_SHAPE}.get(kind, {})
    if kind == "folders":
        sides = {"train_data_dir": "square", "opposite_dir": "circle"}
        values |= {name: str(write_folder(folder / shape, shape)) for name, shape in sides.items()}
    if change:
        pictures = folder / f"pictures_{change}"
        pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in (("a", shapes.draw(SCENE, SIDE)), ("a_after", AFTER[change])):
            picture.save(pictures / f"{name}.png")
        values |= {"train_data_dir": str(pictures), "default_caption": shapes.plain_caption(SCENE)}
    return from_mapping({**values, **dict(change.split("=", 1) for change in changes)})


def measure(config: TrainConfig, lora: Path, questions: Sequence[Question], count: int, steps: int) -> list[str]:
    """What pictures show of each question, in percent. steps: of the sampler."""
    rows = []
    with FileLender(config.base_model).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config).eval()
        if problems := init_from(adapters, read_lora(lora)):
            raise SystemExit(" ".join(problems))
        with adapters:
            for question in questions:
                scenes = evaluate.prompts(count, 1000, (question.shape,), question.pairs)
                adapters.multiplier = question.weight
                seen = [look(picture) for picture in draw(model, Asked(scenes, 1000), steps)]
                shares = []
                for judge in (question.asked, question.kept):
                    hits = [judge(one, scene) for one, scene in zip(seen, scenes)]
                    by_size = [
                        f"{size} {sum(hit for hit, scene in zip(hits, scenes) if scene.size == size)}"
                        for size in shapes.SIZES
                    ]
                    shares.append(f"{100 * sum(hits) / count:.0f} % ({', '.join(by_size)})")
                rows.append(f"{question.says} | {' | '.join(shares)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="KIND or SETTING=VALUE", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--folder", type=Path, default=Path("output/changes"))
    parser.add_argument("--count", type=int, default=64, help="pictures of each row")
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="of the sampler")
    parser.add_argument("--threads", type=int)
    options = parser.parse_intermixed_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    changes = [name for name in options.names if "=" in name]
    kinds = [name for name in options.names if "=" not in name] or KINDS
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    print(f"| learned | steps, seconds | what | of {options.count} as asked | otherwise unchanged |")
    print("| --- | --- | --- | --- | --- |")
    for kind in kinds:
        config = settings(kind, options.folder, changes)
        result = train(config, file_lender(config))
        assert result.lora is not None
        for row in measure(
            config, result.lora, QUESTIONS[kind.partition("_")[2] or kind], options.count, options.steps
        ):
            print(f"| {kind} | {result.total_steps}, {result.seconds:.0f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
