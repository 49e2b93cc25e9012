"""The main job on an embedded default: teach a small base model a shape that it has never seen.

Draws pictures of stars, trains a LoRA of them as any other run would, and draws the same prompts with the base alone
and with the finished file, side by side. The colors and backgrounds of these prompts were not seen together in
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.demo.base import build_base
from lora_trainer.demo.score import score
from lora_trainer.demo.shapes import KNOWN_SHAPES, NEW_SHAPE, Scene, held_out_pairs, plain_caption, write_dataset
from lora_trainer.errors import UserError
from lora_trainer.models.checkpoint import FileLender
from lora_trainer.training.preview import sample

SIDE = 128  # pixels; what the base was trained at
GUIDANCE = 4.0
SAMPLING_STEPS = 20
_GAP, _LABEL = 6, 18  # pixels in the picture of the comparison


@dataclass(frozen=True)
class Comparison:
    """The same prompt and seed drawn by the base alone and with the LoRA."""

    prompt: str
    before: Image.Image
    after: Image.Image

    def shows(self, shape: str) -> tuple[bool, bool]:
        """Whether the picture before, and the one after, shows ``shape``."""
        return score(self.before).shape == shape, score(self.after).shape == shape


def demo_config(folder: Path, base: Path) -> TrainConfig:
    """Draw the training set into ``folder``/pictures; return the settings that train on it."""
    pictures = folder / "pictures"
    _draw_once(pictures)
    return from_mapping(
        {
            "base_model": str(base),
            "train_data_dir": str(pictures),
            # All that this base knows is of the same kind, and near to what is new: more of it has to be kept.
            "preserve": 0.65,
            "preserve_words": list(KNOWN_SHAPES),
            "preserve_pictures": 72,
            "output_dir": str(folder),
            "output_name": NEW_SHAPE,
            "resolution": SIDE,
            "lora_rank": 16,
            "target_modules": ["attn2"],  # the attention that reads the prompt
            "conv_rank": 16,  # a new outline is for the convolutions to learn
            "learning_rate": 3e-3,
            "batch_size": 16,
            "max_train_steps": 650,
            # As the base was trained.
            "min_snr_gamma": None,
            "debiased_estimation": True,
            "noise_offset": 0.1,
            "description": "A five-pointed star, taught to a base model that knew only other shapes.",
        }
    )


def _draw_once(folder: Path) -> None:
    if (folder / "metadata.csv").is_file():
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files.", remedy="Give an empty folder with --output.")
    write_dataset(folder, count=24, shape=NEW_SHAPE, side=SIDE)


def prompts_for(shape: str, count: int) -> list[str]:
    """Prompts for ``shape`` in color and background pairs that ``write_dataset`` kept out of the training."""
    pairs = held_out_pairs()
    chosen = [pairs[index * len(pairs) // count % len(pairs)] for index in range(count)]
    return [
        plain_caption(Scene(shape=shape, color=color, background=background, size=("big", "small")[index % 2]))
        for index, (color, background) in enumerate(chosen)
    ]


def compare(config: TrainConfig, lora: Path, prompts: Sequence[str], seed: int = 1) -> list[Comparison]:
    """Draw ``prompts`` with the base of ``config`` and with the LoRA file, read back as other tools would read it."""
    with FileLender(config.base_model).borrow() as model:
        adapters = AdapterSet.build(model.lora_targets(), config).eval()
        if problems := init_from(adapters, read_lora(lora)):
            raise UserError(" ".join(problems), remedy="Compare it with the settings that it was trained with.")

        def draw(index: int, prompt: str) -> Image.Image:
            size = {"width": SIDE, "height": SIDE}
            return sample(model, prompt, steps=SAMPLING_STEPS, cfg=GUIDANCE, seed=seed + index, **size)

        before = [draw(index, prompt) for index, prompt in enumerate(prompts)]
        with adapters:
            after = [draw(index, prompt) for index, prompt in enumerate(prompts)]
    return [Comparison(*drawn) for drawn in zip(prompts, before, after)]


def contact_sheet(comparisons: Sequence[Comparison], columns: int = 4) -> Image.Image:
    """Pairs before | after in a grid, each under its prompt."""
    width, height = 2 * SIDE + 3 * _GAP, SIDE + _LABEL + _GAP
    rows = -(-len(comparisons) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + _LABEL), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        pen.text((column * width + _GAP, 3), "base", fill="dimgrey")
        pen.text((column * width + 2 * _GAP + SIDE, 3), "with the LoRA", fill="dimgrey")
    for index, comparison in enumerate(comparisons):
        left, top = index % columns * width + _GAP, index // columns * height + _LABEL
        sheet.paste(comparison.before, (left, top))
        sheet.paste(comparison.after, (left + SIDE + _GAP, top))
        pen.text((left, top + SIDE + 2), comparison.prompt, fill="black")
    return sheet


def prepare(folder: Path) -> TrainConfig:
    """Everything before the training: the base model (built on first use) and the drawn pictures."""
    return demo_config(folder, build_base())


def report(config: TrainConfig, lora: Path, count: int = 8) -> str:
    """Draw the comparison beside the LoRA and say what it shows."""
    comparisons = compare(config, lora, prompts_for(NEW_SHAPE, count))
    path = lora.with_name("before-after.png")
    contact_sheet(comparisons).save(path)
    seen = [comparison.shows(NEW_SHAPE) for comparison in comparisons]
    before, after = (sum(column) for column in zip(*seen))
    return (
        f"{path}: of {count} pictures prompted with a {NEW_SHAPE}, {before} show one by the base, {after} with the LoRA"
    )
