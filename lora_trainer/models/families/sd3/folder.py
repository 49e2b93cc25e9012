"""Diffusers folders of Stable Diffusion 3 under the names of an all-in-one file."""

from __future__ import annotations

import math
from pathlib import Path

from lora_trainer.models.families.flow.folder import read_pipeline
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.names import layers, others
from lora_trainer.models.families.sd3.shapes import HEAD_DIM, TITLE
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors

_CLIPS, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of Stable Diffusion 3. Raises UserError when a part of it is missing."""
    encoders = [*_CLIPS, *([_T5] if (folder / _T5).is_dir() else [])]
    return read_pipeline(folder, "StableDiffusion3Pipeline", TITLE, _shape, layers, others, encoders)


def _shape(shapes: Shapes) -> Sd3Shape:
    norm = "transformer_blocks.0.attn.norm_q.weight"
    width, channels, *_ = shapes["pos_embed.proj.weight"]
    return Sd3Shape(
        blocks=count(shapes, lambda i: f"transformer_blocks.{i}.attn.to_q.weight"),
        dual=count(shapes, lambda i: f"transformer_blocks.{i}.attn2.to_q.weight"),
        width=width,
        heads=width // (shapes[norm][0] if norm in shapes else HEAD_DIM),
        hidden=shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
        channels=channels,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        positions=math.isqrt(shapes["pos_embed.pos_embed"][1]),
        normalized=norm in shapes,
    )
