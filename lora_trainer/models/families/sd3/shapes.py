"""Reads what a Stable Diffusion 3 is made of off the names and shapes of its tensors."""

from __future__ import annotations

import math

from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.names import FIRST_BLOCK
from lora_trainer.models.family import Shapes

TITLE = "Stable Diffusion 3"
HEAD_DIM = 64


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
