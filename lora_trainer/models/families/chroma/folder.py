"""Diffusers folders of Chroma under the names of an all-in-one file."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.chroma.names import layers, others
from lora_trainer.models.families.chroma.shapes import maker_shape
from lora_trainer.models.families.flow.folder import add_fused, add_text
from lora_trainer.models.families.flux.folder import blocks_shape
from lora_trainer.models.families.unet.folder import add_vae, component
from lora_trainer.models.hints import Hints, read_json
from lora_trainer.models.tensors import Tensors


def read_folder(folder: Path) -> tuple[Tensors, Hints] | None:
    """None when it is not one of Chroma. Raises UserError when a part of it is missing."""
    if read_json(folder / "model_index.json").get("_class_name") != "ChromaPipeline":
        return None
    tensors = Tensors()
    where = {name: source for source in component(folder / "transformer") for name in source.shapes}
    shapes = {name: source.shapes[name] for name, source in where.items()}
    try:
        shape = ChromaShape(**blocks_shape(shapes), **maker_shape(shapes, "", "linear_1"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The transformer of this Chroma folder lacks layers ({error}).",
            field="base_model",
            remedy="The folder is incomplete; download the model again.",
        ) from error
    add_fused(tensors, where, layers(shape), others(shape))
    for source in component(folder / "vae"):
        add_vae(tensors, source)
    for source in component(folder / "text_encoder"):
        add_text(tensors, source)
    return tensors, Hints()
