"""Diffusers folders of Stable Diffusion 3 under the names of an all-in-one file."""

from __future__ import annotations

import math
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.flow.folder import add_fused, add_text
from lora_trainer.models.families.flow.shapes import count
from lora_trainer.models.families.sd3.architecture import Sd3Shape
from lora_trainer.models.families.sd3.names import layers, others
from lora_trainer.models.families.sd3.shapes import HEAD_DIM
from lora_trainer.models.families.unet.folder import add_vae, component
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.tensors import Tensors

_CLIPS, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of Stable Diffusion 3. Raises UserError when a part of it is missing."""
    if read_json(folder / "model_index.json").get("_class_name") != "StableDiffusion3Pipeline":
        return None
    tensors = Tensors()
    where = {name: source for source in component(folder / "transformer") for name in source.shapes}
    shape = _shape({name: source.shapes[name] for name, source in where.items()})
    add_fused(tensors, where, layers(shape), others(shape))
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    for part in (*_CLIPS, *([_T5] if (folder / _T5).is_dir() else [])):
        for source in component(folder / part):
            add_text(tensors, source)
    return tensors, Hints()


def _shape(shapes: dict[str, tuple[int, ...]]) -> Sd3Shape:
    """Enough of the shape to name the layers."""
    norm = "transformer_blocks.0.attn.norm_q.weight"
    try:
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
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The transformer of this Stable Diffusion 3 folder lacks layers ({error}).",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        ) from error
