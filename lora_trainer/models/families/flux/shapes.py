"""Reads what a FLUX.1 is made of off the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any

from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.names import FIRST_BLOCK
from lora_trainer.models.family import Shapes
from lora_trainer.models.other_files import other_family

TITLE = "FLUX.1"


def claims(shapes: Shapes) -> bool:
    return f"{TRANSFORMER}{FIRST_BLOCK}" in shapes and other_family(shapes) == TITLE


def transformer_shape(shapes: Shapes) -> FluxShape:
    """Raises KeyError, IndexError or ValueError where layers are missing."""
    pooled = shapes[f"{TRANSFORMER}vector_in.in_layer.weight"][1]
    distilled = f"{TRANSFORMER}guidance_in.in_layer.weight" in shapes
    return FluxShape(**blocks_shape(shapes), pooled_dim=pooled, guidance=distilled)


def blocks_shape(shapes: Shapes) -> dict[str, Any]:
    """What is said of a ``FluxShape`` by all but what its vector is made of. Raises as ``transformer_shape``."""

    def shape(name: str) -> tuple[int, ...]:
        return shapes[TRANSFORMER + name]

    width, channels = shape("img_in.weight")
    head_dim = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    return {
        "double": count(shapes, lambda i: f"{TRANSFORMER}double_blocks.{i}.img_attn.qkv.weight"),
        "single": count(shapes, lambda i: f"{TRANSFORMER}single_blocks.{i}.linear1.weight"),
        "width": width,
        "heads": width // head_dim,
        "hidden": shape("double_blocks.0.img_mlp.0.weight")[0],
        "channels": channels,
        "context_dim": shape("txt_in.weight")[1],
        "axes": axes_of(head_dim),
    }


def axes_of(head_dim: int) -> tuple[int, ...]:
    """Channels of a head for each axis of a position: an eighth for the first, as in FLUX's (16, 56, 56), or the next
    number with which all three are even."""
    for first in range(max(2, head_dim // 8 // 2 * 2), head_dim, 2):
        rest = (head_dim - first) // 2
        if rest % 2 == 0 and first + 2 * rest == head_dim:
            return first, rest, rest
    raise ValueError(f"heads of {head_dim} channels")
