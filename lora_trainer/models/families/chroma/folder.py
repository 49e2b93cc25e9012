"""Diffusers folders of Chroma under the names of an all-in-one file."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.chroma.names import layers, others
from lora_trainer.models.families.chroma.shapes import TITLE, maker_shape
from lora_trainer.models.families.flow.folder import read_pipeline
from lora_trainer.models.families.flux.folder import blocks_shape
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of Chroma. Raises UserError when a part of it is missing."""
    return read_pipeline(folder, "ChromaPipeline", TITLE, _shape, layers, others, ["text_encoder"])


def _shape(shapes: Shapes) -> ChromaShape:
    return ChromaShape(**blocks_shape(shapes), **maker_shape(shapes, "", "linear_1"))
