"""Diffusers folders of FLUX.1 under the names of an all-in-one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_trainer.errors import UserError
from lora_trainer.models.families.flow.folder import add_fused, add_text
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.flux.names import layers, norms
from lora_trainer.models.families.flux.shapes import axes_of
from lora_trainer.models.families.unet.folder import add_vae, component
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.tensors import Tensors


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of FLUX.1. Raises UserError when a part of it is missing."""
    if read_json(folder / "model_index.json").get("_class_name") != "FluxPipeline":
        return None
    tensors = Tensors()
    where = {name: source for source in component(folder / "transformer") for name in source.shapes}
    shape = _shape({name: source.shapes[name] for name, source in where.items()})
    add_fused(tensors, where, layers(shape), norms(shape))
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    for part in ("text_encoder", "text_encoder_2"):
        for source in component(folder / part):
            add_text(tensors, source)
    return tensors, Hints()


def _shape(shapes: dict[str, tuple[int, ...]]) -> FluxShape:
    """Enough of the shape to name the layers. Raises UserError where layers are missing."""
    try:
        text = "time_text_embed.text_embedder.linear_1.weight"
        guided = "time_text_embed.guidance_embedder.linear_1.weight" in shapes
        return FluxShape(**blocks_shape(shapes), pooled_dim=shapes[text][1], guidance=guided)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The transformer of this FLUX.1 folder lacks layers ({error}).",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        ) from error


def blocks_shape(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What diffusers' names tell of a ``FluxShape``. Raises KeyError or ValueError where layers are missing."""

    def count(name: str) -> int:
        number = 0
        while name.format(number) in shapes:
            number += 1
        return number

    width, channels = shapes["x_embedder.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "double": count("transformer_blocks.{}.attn.to_q.weight"),
        "single": count("single_transformer_blocks.{}.attn.to_q.weight"),
        "width": width,
        "heads": width // head_dim,
        "hidden": shapes["transformer_blocks.0.ff.net.0.proj.weight"][0],
        "channels": channels,
        "context_dim": shapes["context_embedder.weight"][1],
        "axes": axes_of(head_dim),
    }
