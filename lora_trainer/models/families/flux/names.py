"""The names of FLUX.1's tensors: in single files, in diffusers folders, and in the files that lie beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_trainer.models.families.flux.architecture import FluxShape
from lora_trainer.models.families.unet.names import UNET, VAE

TRANSFORMER = UNET
CLIP = "text_encoders.clip_l.transformer."
T5 = "text_encoders.t5xxl.transformer."
FIRST_BLOCK = "double_blocks.0.img_attn.qkv.weight"
_CLIP_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")


def usual_name(name: str, names: Mapping[str, Any]) -> str:
    """The name in an all-in-one file. names: all of the file's."""
    if FIRST_BLOCK in names:
        return TRANSFORMER + name
    if f"{TRANSFORMER}{FIRST_BLOCK}" in names and name.startswith("vae."):
        return VAE + name.removeprefix("vae.")
    return name


def text_name(name: str) -> str | None:
    """The name, in an all-in-one file, of a tensor of a text encoder's own file; None for what is not needed."""
    if name.startswith(("shared.", "encoder.block.", "encoder.final_layer_norm.")):
        return T5 + name
    if name.startswith("text_model."):
        return CLIP + name
    if name.startswith(_CLIP_PARTS):  # transformers 5.6 and later leave the first level out
        return f"{CLIP}text_model.{name}"
    return None


@dataclass(frozen=True)
class Layer:
    """A layer of the transformer. name: Black Forest Labs'. parts: diffusers' names of what it is, and their rows.

    group: see ``LoraTarget``; "" for layers that adapters do not attach to. swapped: diffusers has its halves the other
    way round.
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    group: str = ""
    swapped: bool = False


def layers(shape: FluxShape) -> Iterator[Layer]:
    """Every Linear layer, in the order in which they run."""
    width, hidden = shape.width, shape.hidden
    yield Layer("img_in", (("x_embedder", width),))
    yield Layer("txt_in", (("context_embedder", width),))
    embedders = {"time_in": "timestep", "vector_in": "text", **({"guidance_in": "guidance"} if shape.guidance else {})}
    for name, theirs in embedders.items():
        for ours, number in (("in_layer", 1), ("out_layer", 2)):
            yield Layer(f"{name}.{ours}", ((f"time_text_embed.{theirs}_embedder.linear_{number}", width),))
    for index in range(shape.double):
        block, theirs = f"double_blocks.{index}", f"transformer_blocks.{index}"
        qkv = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
        rest = {"img": ("to_out.0", "ff", "norm1"), "txt": ("to_add_out", "ff_context", "norm1_context")}
        for side in ("img", "txt"):
            out, feed_forward, norm = rest[side]
            parts = tuple((f"{theirs}.attn.{name}", width) for name in qkv[side])
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
        yield Layer(f"{block}.modulation.lin", ((f"{theirs}.norm.linear", 3 * width),), "projection")
    yield Layer("final_layer.linear", (("proj_out", shape.channels),))
    yield Layer("final_layer.adaLN_modulation.1", (("norm_out.linear", 2 * width),), swapped=True)


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
