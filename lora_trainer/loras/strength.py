"""How strongly a LoRA changes each block of its model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from lora_trainer.adapters.base import weight_shape
from lora_trainer.errors import UserError
from lora_trainer.loras.layers import GIVE_BASE, Turn, factors_of, open_layers
from lora_trainer.models.base import LoraTarget

_BLOCK = re.compile(r"(?P<side>input|middle|output)_blocks?\.(?P<number>\d+)\.")
_SIDES = {"input": "IN", "middle": "M", "output": "OUT"}


def strength_by_block(
    lora: str | Path, base: str | Path | None = None, turn: Turn = nullcontext
) -> dict[str, float]:
    """‖ΔW‖ (Frobenius) over all layers of each block, in the order of the model.

    Blocks have the names of the block-weight extensions: IN01 … M00 … OUT11; text encoders are TE1 and TE2. Of a DoRA
    the change before its magnitudes is measured.

    Raises:
        UserError: as ``open_layers``; or the shapes are not those of the base.
    """
    layers = open_layers(lora, base, turn)
    squares: dict[str, float] = {}
    for target in layers.targets:
        weights = layers.matched.get(target.kohya_name)
        if weights is not None:
            shape = weight_shape(target.module)
            try:
                if weights.kind == "lora":
                    square = factors_of(weights, shape).squared_norm()
                else:
                    square = float(weights.delta(shape).double().square().sum())
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"{Path(lora).name}: {weights.name} does not fit its layer ({error}).", remedy=GIVE_BASE
                ) from error
            name = block_name(target)
            squares[name] = squares.get(name, 0.0) + square
    return {name: square**0.5 for name, square in squares.items()}


def block_name(target: LoraTarget) -> str:
    """IN00 … OUT11 of a UNet's layer, TE1 or TE2 of a text encoder's; else the first two parts of its own name."""
    if target.part.startswith("text_encoder"):
        return f"TE{target.part.removeprefix('text_encoder').lstrip('_') or 1}"
    found = _BLOCK.search(target.checkpoint_name or "")
    if found is None:
        return ".".join(target.diffusers_name.split(".")[1:3])
    return f"{_SIDES[found['side']]}{int(found['number']):02}"


def bars(strengths: dict[str, float], width: int = 40) -> Sequence[str]:
    """A bar chart as lines of text."""
    highest = max(strengths.values(), default=0.0) or 1.0
    longest = max(map(len, strengths), default=0)
    return [
        f"{name:<{longest}} {'█' * round(width * value / highest):<{width}} {value:.4g}"
        for name, value in strengths.items()
    ]
