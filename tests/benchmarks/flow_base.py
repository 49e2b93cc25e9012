"""A small transformer in FLUX.1's layout that learns to draw the demo's shapes, and a LoRA that teaches it stars.

    python -m tests.benchmarks.flow_base                   trains from scratch; goes on when it is started again
    python -m tests.benchmarks.flow_base star              scores it, trains a LoRA of stars on it, and scores that
    python -m tests.benchmarks.flow_base star mixed_precision=bf16     faster on a CPU that computes in bf16

Measured on one thread of such a CPU, with torch 2.14.1: of 24 pictures of known shapes, 11 showed the shape after 5
minutes of the processor, 23 after 12, 24 after 12.5 (2126 steps; the first 6.8 minutes were begun with --minutes 32,
the rest with 12.5), all in the colors that were asked for. After 500 steps of the LoRA in bf16 (430 s), in colors that
no star was trained with: 17 stars of 24 (the base alone 0), and 24 known shapes of 24 (the base alone 22). 200 steps in
fp32 at a learning rate of 1e-3 and a sigma_shift of 3 gave 1 star of 24.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_trainer.adapters.initialize import init_from
from lora_trainer.adapters.inject import AdapterSet
from lora_trainer.adapters.lora_file import read_lora
from lora_trainer.config import TrainConfig, from_mapping
from lora_trainer.demo import shapes
from lora_trainer.demo.evaluate import Accuracy, accuracy
from lora_trainer.models.base import FlowSchedule
from lora_trainer.run import file_lender, train
from lora_trainer.training.sampling import guided_pred
from tests.benchmarks.flow_parts import write_parts
from tests.benchmarks.flow_pretraining import (
    GUIDANCE,
    SIDE,
    SIZE,
    Pretraining,
    asked,
    draw,
    learn_base,
    sheet,
)


def write_pictures(folder: Path, shape: str, count: int, pairs: Sequence[tuple[str, str]], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(asked((shape,), count, seed, pairs)):
        scene = shapes.random_scene(np.random.default_rng((seed, index)), shape, scene.color, scene.background, SIZE)
        shapes.draw(scene, SIDE).save(folder / f"{shape}_{index:02}.png")
        (folder / f"{shape}_{index:02}.txt").write_text(shapes.plain_caption(scene), encoding="utf-8")


def star_config(folder: Path, settings: dict[str, object], changes: Iterable[str] = ()) -> TrainConfig:
    """Draw stars, and known shapes that keep the base from forgetting them; the settings that train on both."""
    held_out = shapes.held_out_pairs()
    pairs = [pair for pair in shapes.color_pairs() if pair not in held_out]
    write_pictures(folder / "pictures", shapes.NEW_SHAPE, 24, pairs, 0)
    for seed, shape in enumerate(shapes.KNOWN_SHAPES, start=1):
        write_pictures(folder / "known", shape, 4, shapes.color_pairs(), seed)
    values = {
        **settings,
        "train_data_dir": str(folder / "pictures"),
        "reg_data_dir": str(folder / "known"),
        "output_dir": str(folder),
        "output_name": shapes.NEW_SHAPE,
        "overwrite": True,
        "resume": "never",
        "tensorboard": False,
        "resolution": SIDE,
        "lora_rank": 16,
        "alpha": 16,
        "learning_rate": 4e-3,
        "batch_size": 8,
        "max_train_steps": 500,
        "caption_dropout": 0.1,
        "sigma_sampling": "shift",
        "sigma_shift": 5,
    }
    return from_mapping({**values, **dict(change.split("=", 1) for change in changes)})


def measure(config: TrainConfig, lora: Path | None, names: Sequence[str], count: int) -> Accuracy:
    """What pictures of ``names`` show in colors that no star was trained with; lora None: by the base alone. They are
    drawn by the lent model, with all of the text's padding."""
    scenes = asked(names, count, 1000, shapes.held_out_pairs())
    with file_lender(config).borrow() as model, torch.no_grad():
        adapters = AdapterSet.build(model.lora_targets(), config, model.device).eval()
        if lora is not None and (problems := init_from(adapters, read_lora(lora))):
            raise SystemExit(" ".join(problems))
        texts = [*[""] * count, *(shapes.plain_caption(scene) for scene in scenes)]
        conditioning, schedule = model.encode_prompts(texts), model.schedule
        assert isinstance(schedule, FlowSchedule)

        def velocity(latents: Tensor, level: float) -> Tensor:
            return guided_pred(model, latents, level, conditioning, None, GUIDANCE)

        with adapters, adapters.enabled(lora is not None):
            drawn = draw(velocity, schedule, count, seed=1000)
    name = f"{names[0] if len(names) == 1 else 'known'}_{'base' if lora is None else 'lora'}.png"
    sheet(drawn, Path(config.output_dir) / name)
    return accuracy(drawn, scenes)


def learn_star(folder: Path, count: int, changes: Iterable[str]) -> None:
    if not (folder / "state.pt").is_file():
        raise SystemExit(f"{folder} has no base; train it first, without star")
    Pretraining.resumed(folder).export()
    config = star_config(folder / "star", write_parts(folder), changes)
    kinds = ((shapes.NEW_SHAPE,), shapes.KNOWN_SHAPES)
    for names in kinds:
        found = measure(config, None, names, count)
        print(f"base alone, {', '.join(names)}: {found}; shapes seen: {found.seen}", flush=True)
    result = train(config, file_lender(config))
    assert result.lora is not None
    print(f"{result.total_steps} steps, {result.seconds:.0f} s", flush=True)
    for names in kinds:
        found = measure(config, result.lora, names, count)
        print(f"with the LoRA, {', '.join(names)}: {found}; shapes seen: {found.seen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("base", "star"), default="base")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of the LoRA")
    parser.add_argument("--folder", type=Path, default=Path("output/flow_base"))
    parser.add_argument("--minutes", type=float, default=15, help="of the processor, for the base")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--double", type=int, default=2, help="double blocks")
    parser.add_argument("--single", type=int, default=4, help="single blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=32, help="pictures of each kind that are scored")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_flash_sdp(False)  # on a CPU the written-out attention is faster for heads this narrow
    if options.what == "star":
        learn_star(options.folder, options.count, options.settings)
    else:
        sizes = {name: getattr(options, name) for name in ("width", "double", "single")}
        learn_base(options.folder, options.minutes, options.seed, **sizes)


if __name__ == "__main__":
    main()
