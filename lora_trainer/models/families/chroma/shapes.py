"""Reads what a Chroma is made of off the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.chroma.names import MAKER
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.flux.names import FIRST_BLOCK
from lora_trainer.models.families.flux.shapes import blocks_shape
from lora_trainer.models.family import Shapes
from lora_trainer.models.other_files import other_family

TITLE = "Chroma"


def claims(shapes: Shapes) -> bool:
    return f"{TRANSFORMER}{FIRST_BLOCK}" in shapes and other_family(shapes) == TITLE


def transformer_shape(shapes: Shapes) -> ChromaShape:
    """Raises KeyError, IndexError or ValueError where layers are missing."""
    return ChromaShape(**blocks_shape(shapes), **maker_shape(shapes, TRANSFORMER, "in_layer"))


def maker_shape(shapes: Mapping[str, tuple[int, ...]], prefix: str, first_layer: str) -> dict[str, Any]:
    """What is said of a ``ChromaShape`` by the network that makes modulations, which diffusers names alike."""
    maker = prefix + MAKER
    width, inputs = shapes[f"{maker}.in_proj.weight"]
    layers = count(shapes, lambda i: f"{maker}.layers.{i}.{first_layer}.weight")
    rest = {"pooled_dim": 0, "guidance": False}
    return {"maker_inputs": inputs, "maker_width": width, "maker_layers": layers, **rest}
