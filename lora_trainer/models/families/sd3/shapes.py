"""Reads what a Stable Diffusion 3 is made of off the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.names import FIRST_BLOCK
from lora_trainer.models.family import Shapes

TITLE = "Stable Diffusion 3"
HEAD_DIM = 64
MEDIUM, MEDIUM_35, LARGE_35 = "3-medium", "3-5-medium", "3-5-large"
"""kohya's names of the variants."""
TITLES = {MEDIUM: f"{TITLE} medium", MEDIUM_35: f"{TITLE}.5 medium", LARGE_35: f"{TITLE}.5 large"}
USUAL = {
    MEDIUM: Sd3Shape(24, 0, 1536, 24, 6144, 16, 4096, 2048, 192, normalized=False),
    MEDIUM_35: Sd3Shape(24, 13, 1536, 24, 6144, 16, 4096, 2048, 384, normalized=True),
    LARGE_35: Sd3Shape(38, 0, 2432, 38, 9728, 16, 4096, 2048, 192, normalized=True),
}
_BLOCK = re.compile(r"(?:joint|transformer)_blocks[._](\d+)[._]")


def claims(shapes: Shapes) -> bool:
    return f"{TRANSFORMER}{FIRST_BLOCK}" in shapes


def transformer_shape(shapes: Shapes) -> Sd3Shape:
    """Raises KeyError, IndexError or ValueError where layers are missing."""

    def shape(name: str) -> tuple[int, ...]:
        return shapes[TRANSFORMER + name]

    width, channels, *patch = shape("x_embedder.proj.weight")
    if patch != [2, 2]:
        raise ValueError(f"patches of {patch}")
    norm = f"{TRANSFORMER}joint_blocks.0.x_block.attn.ln_q.weight"
    return Sd3Shape(
        blocks=count(shapes, lambda i: f"{TRANSFORMER}joint_blocks.{i}.x_block.attn.qkv.weight"),
        dual=count(shapes, lambda i: f"{TRANSFORMER}joint_blocks.{i}.x_block.attn2.qkv.weight"),
        width=width,
        heads=width // (shapes[norm][0] if norm in shapes else HEAD_DIM),
        hidden=shape("joint_blocks.0.x_block.mlp.fc1.weight")[0],
        channels=channels,
        context_dim=shape("context_embedder.weight")[1],
        pooled_dim=shape("y_embedder.mlp.0.weight")[1],
        positions=math.isqrt(shape("pos_embed")[1]),
        normalized=norm in shapes,
    )


def variant(shape: Sd3Shape) -> str:
    return MEDIUM if not shape.normalized else MEDIUM_35 if shape.dual else LARGE_35


def variant_of_lora(version: str, names: Collection[str]) -> str:
    """version, names: see ``Family.usual_for``."""
    if version in USUAL:
        return version
    if any("attn2" in name for name in names):
        return MEDIUM_35
    blocks = [int(found[1]) for name in names if (found := _BLOCK.search(name))]
    return LARGE_35 if max(blocks, default=0) >= USUAL[MEDIUM].blocks else MEDIUM
