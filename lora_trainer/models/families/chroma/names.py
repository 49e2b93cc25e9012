"""The names of Chroma's tensors in single files and in diffusers folders."""

from __future__ import annotations

from collections.abc import Iterator

from lora_trainer.models.families.chroma.architecture import ChromaShape
from lora_trainer.models.families.flow.names import Layer
from lora_trainer.models.families.flux.names import blocks, norms

MAKER = "distilled_guidance_layer"


def layers(shape: ChromaShape) -> Iterator[Layer]:
    """Every Linear layer, in the order in which they run."""
    yield Layer("img_in", (("x_embedder", shape.width),))
    yield Layer("txt_in", (("context_embedder", shape.width),))
    yield Layer(f"{MAKER}.in_proj", ((f"{MAKER}.in_proj", shape.maker_width),))
    for index in range(shape.maker_layers):
        for ours, number in (("in_layer", 1), ("out_layer", 2)):
            name = f"{MAKER}.layers.{index}"
            yield Layer(f"{name}.{ours}", ((f"{name}.linear_{number}", shape.maker_width),))
    yield Layer(f"{MAKER}.out_proj", ((f"{MAKER}.out_proj", shape.width),))
    yield from blocks(shape, modulated=False)
    yield Layer("final_layer.linear", (("proj_out", shape.channels),))


def others(shape: ChromaShape) -> Iterator[tuple[str, str]]:
    """The single file's and diffusers' name of every normalization's weight."""
    yield from norms(shape)
    for index in range(shape.maker_layers):
        yield f"{MAKER}.norms.{index}.scale", f"{MAKER}.norms.{index}.weight"
