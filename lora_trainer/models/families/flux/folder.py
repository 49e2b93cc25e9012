"""Diffusers folders of FLUX.1 under the names of an all-in-one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_trainer.models.families.flow.folder import read_pipeline
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.names import layers, norms
from lora_trainer.models.families.flux.shapes import TITLE, axes_of
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.tensors import Tensors


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of FLUX.1. Raises UserError when a part of it is missing."""
    return read_pipeline(
        folder, "FluxPipeline", TITLE, _shape, layers, norms, ["text_encoder", "text_encoder_2"]
    )


def _shape(shapes: Shapes) -> FluxShape:
    text = "time_text_embed.text_embedder.linear_1.weight"
    distilled = "time_text_embed.guidance_embedder.linear_1.weight" in shapes
    return FluxShape(**blocks_shape(shapes), pooled_dim=shapes[text][1], guidance=distilled)


def blocks_shape(shapes: Shapes) -> dict[str, Any]:
    """What diffusers' names tell of a ``FluxShape``. Raises KeyError or ValueError where layers are missing."""
    width, channels = shapes["x_embedder.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "double": count(shapes, lambda i: f"transformer_blocks.{i}.attn.to_q.weight"),
        "single": count(shapes, lambda i: f"single_transformer_blocks.{i}.attn.to_q.weight"),
        "width": width,
        "heads": width // head_dim,
        "hidden": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
        "channels": channels,
        "context_dim": shapes["context_embedder.weight"][1],
        "axes": axes_of(head_dim),
    }
