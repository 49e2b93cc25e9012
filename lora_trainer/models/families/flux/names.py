"""The names of FLUX.1's tensors in single files and in diffusers folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_trainer.models.families.flow.names import TRANSFORMER, Layer
from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.unet.names import VAE

FIRST_BLOCK = "double_blocks.0.img_attn.qkv.weight"


def usual_name(name: str, names: Mapping[str, Any]) -> str:
    """The name in an all-in-one file. names: all of the file's."""
    if FIRST_BLOCK in names:
        return TRANSFORMER + name
    if f"{TRANSFORMER}{FIRST_BLOCK}" in names and name.startswith("vae."):
        return VAE + name.removeprefix("vae.")
    return name


def layers(shape: FluxShape) -> Iterator[Layer]:
    """Every Linear layer, in the order in which they run."""
    width = shape.width
    yield Layer("img_in", (("x_embedder", width),))
    yield Layer("txt_in", (("context_embedder", width),))
    embedders = {"time_in": "timestep", "vector_in": "text", **({"guidance_in": "guidance"} if shape.guidance else {})}
    for name, theirs in embedders.items():
        for ours, number in (("in_layer", 1), ("out_layer", 2)):
            yield Layer(f"{name}.{ours}", ((f"time_text_embed.{theirs}_embedder.linear_{number}", width),))
    yield from blocks(shape)
    yield Layer("final_layer.linear", (("proj_out", shape.channels),))
    yield Layer("final_layer.adaLN_modulation.1", (("norm_out.linear", 2 * width),), swapped=True)


def blocks(shape: FluxShape, modulated: bool = True) -> Iterator[Layer]:
    """The layers of the blocks. modulated: with those that make shifts, scales and gates."""
    width, hidden = shape.width, shape.hidden
    for index in range(shape.double):
        block, theirs = f"double_blocks.{index}", f"transformer_blocks.{index}"
        qkv = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
        rest = {"img": ("to_out.0", "ff", "norm1"), "txt": ("to_add_out", "ff_context", "norm1_context")}
        for side in ("img", "txt"):
            out, feed_forward, norm = rest[side]
            parts = tuple((f"{theirs}.attn.{name}", width) for name in qkv[side])
            if modulated:
                yield Layer(f"{block}.{side}_mod.lin", ((f"{theirs}.{norm}.linear", 6 * width),), "projection")
            yield Layer(f"{block}.{side}_attn.qkv", parts, "attention")
            yield Layer(f"{block}.{side}_attn.proj", ((f"{theirs}.attn.{out}", width),), "attention")
            yield Layer(f"{block}.{side}_mlp.0", ((f"{theirs}.{feed_forward}.net.0.proj", hidden),), "feed_forward")
            yield Layer(f"{block}.{side}_mlp.2", ((f"{theirs}.{feed_forward}.net.2", width),), "feed_forward")
    for index in range(shape.single):
        block, theirs = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        parts = tuple((f"{theirs}.attn.{name}", width) for name in ("to_q", "to_k", "to_v"))
        yield Layer(f"{block}.linear1", (*parts, (f"{theirs}.proj_mlp", hidden)), "attention")
        yield Layer(f"{block}.linear2", ((f"{theirs}.proj_out", width),), "attention")
        if modulated:
            yield Layer(f"{block}.modulation.lin", ((f"{theirs}.norm.linear", 3 * width),), "projection")


def norms(shape: FluxShape) -> Iterator[tuple[str, str]]:
    """Black Forest Labs' and diffusers' name of every normalization's weight."""
    for index in range(shape.double):
        for side, prefix in (("img", "norm_"), ("txt", "norm_added_")):
            for name, letter in (("query_norm", "q"), ("key_norm", "k")):
                ours = f"double_blocks.{index}.{side}_attn.norm.{name}.scale"
                yield ours, f"transformer_blocks.{index}.attn.{prefix}{letter}.weight"
    for index in range(shape.single):
        for name, letter in (("query_norm", "q"), ("key_norm", "k")):
            ours = f"single_blocks.{index}.norm.{name}.scale"
            yield ours, f"single_transformer_blocks.{index}.attn.norm_{letter}.weight"
