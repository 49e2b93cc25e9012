"""Shapes that the demo's base has never seen, a run that teaches it one, and scores of many pictures at once."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import TrainConfig, from_mapping, to_mapping
from lora_trainer.demo import evaluate, sampling, shapes
from lora_trainer.demo.main import GUIDANCE, SAMPLING_STEPS, prepare
from lora_trainer.demo.score import score
from lora_trainer.models.base import LentModel
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.training.precision import resolve

STRICT_OVERLAP = 0.8
"""The strict scorer also asks for this intersection over union with the outline that was asked for."""
_BATCH = 32

Outline = list[tuple[float, float]]


def arrow() -> Outline:
    """A block arrow that points upwards."""
    return [(0, -1.1), (0.9, -0.1), (0.36, -0.1), (0.36, 1.0), (-0.36, 1.0), (-0.36, -0.1), (-0.9, -0.1)]


def moon() -> Outline:
    """A crescent that opens to the right."""
    outer = [math.radians(60 + 240 * step / 36) for step in range(37)]
    inner = [math.radians(270 - 180 * step / 36) for step in range(37)]
    back = [(0.5 + 0.62 * math.cos(angle), math.sin(outer[0]) * math.sin(angle)) for angle in inner]
    return [(math.cos(angle), math.sin(angle)) for angle in outer] + back


UNSEEN: dict[str, Callable[[], Outline]] = {"arrow": arrow, "moon": moon}


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with ``--threads`` and settings to change, and make the shapes known."""
    parser.add_argument("--threads", type=int)
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_intermixed_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    add_shapes()
    return options


def add_shapes() -> None:
    """Make the shapes of ``UNSEEN`` known to those who draw and judge pictures."""
    shapes.OUTLINES.update({name: outline() for name, outline in UNSEEN.items()})


def run_config(shape: str, folder: Path, count: int, **changes: object) -> TrainConfig:
    """The demo's settings for ``count`` pictures of another shape, without preserve; all the usual layers and the text
    encoder learn."""
    pictures = folder / "pictures"
    if not (pictures / "metadata.csv").is_file():
        shapes.write_dataset(pictures, count, shape)
    base = prepare(folder.parent / "demo")
    return dataclasses.replace(
        base,
        **{
            "train_data_dir": str(pictures),
            "output_dir": str(folder),
            "output_name": shape,
            "description": "",
            "preserve": 0.0,
            "preserve_words": [],
            "preserve_pictures": 0,
            "caption_dropout": 0.1,
            "target_modules": TrainConfig().target_modules,
            "train_text_encoder": True,
            "learning_rate": 2e-3,
            "text_encoder_lr": 1e-3,
            **changes,
        },
    )


def changed(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """``config`` with settings that are given as NAME=VALUE."""
    return from_mapping({**to_mapping(config), **dict(setting.split("=", 1) for setting in settings)})


@dataclass(frozen=True)
class Asked:
    """Prompts of some kind with the color and background pairs that the training held out."""

    scenes: Sequence[shapes.Scene]
    seed: int

    @classmethod
    def of(cls, names: Sequence[str], count: int, seed: int = 1000) -> Asked:
        return cls(evaluate.prompts(count, seed, names, shapes.held_out_pairs()), seed)


@dataclass(frozen=True)
class Score:
    """Percent of the pictures that show what was asked for: the shape alone; the shape by the strict scorer; the shape
    with its color and background; and all that by the strict scorer."""

    shape: float
    strict: float
    whole: float
    strict_whole: float

    def __str__(self) -> str:
        alone = f"shape {self.shape:5.1f} %  strict {self.strict:5.1f} %"
        return f"{alone}  with colors {self.whole:5.1f} %  strict {self.strict_whole:5.1f} %"


def judge(pictures: Sequence[Image.Image], scenes: Sequence[shapes.Scene], new: str) -> Score:
    names = (*shapes.KNOWN_SHAPES, new)
    hits = []
    for picture, asked in zip(pictures, scenes):
        seen = score(picture, names)
        shape = seen.shape == asked.shape
        colors = (seen.color, seen.background) == (asked.color, asked.background)
        strict = shape and seen.overlap[asked.shape] >= STRICT_OVERLAP
        hits.append((shape, strict, shape and colors, strict and colors))
    return Score(*(100 * sum(column) / len(hits) for column in zip(*hits)))


@torch.no_grad()
def draw(model: LentModel, asked: Asked, steps: int = SAMPLING_STEPS) -> list[Image.Image]:
    """All pictures by DDIM, as the demo draws them one by one, but for the decoder, which only enlarges."""
    drawn: list[Image.Image] = []
    alphas, device = sampling.alphas_cumprod(), model.device
    times = torch.linspace(len(alphas) - 1, 0, steps + 1).long().tolist()
    for start in range(0, len(asked.scenes), _BATCH):
        texts = [shapes.plain_caption(scene) for scene in asked.scenes[start : start + _BATCH]]
        conditioning = model.encode_prompts([*[""] * len(texts), *texts])
        generator = torch.Generator().manual_seed(asked.seed + start)
        latents = torch.randn((len(texts), 4, 16, 16), generator=generator).to(device)
        for now, after in itertools.pairwise(times):
            step = torch.full((2 * len(texts),), now, device=device)
            free, told = model.predict(torch.cat([latents, latents]), step, conditioning, None).chunk(2)
            noise = free + GUIDANCE * (told - free)
            clean = (latents - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
            latents = clean if after == 0 else alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * noise
        drawn += sampling.pictures_of(latents.cpu())
    return drawn


def scores(config: TrainConfig, lora: Path | None, asked: Sequence[Asked], new: str) -> list[Score]:
    """The score of each kind of prompts with a LoRA; None: by the base alone."""
    precision = resolve(config.device, config.mixed_precision)
    lender = FileLender(config.base_model, device=precision.device, weight_dtype=precision.weight_dtype)
    with lender.borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config, model.device).eval()
        if lora is not None and (problems := init_from(adapters, read_lora(lora))):
            raise SystemExit(" ".join(problems))
        with adapters, adapters.enabled(lora is not None):
            return [judge(draw(model, kind), kind.scenes, new) for kind in asked]
