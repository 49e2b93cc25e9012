"""The names of Stable Diffusion 3's tensors in single files and in diffusers folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_trainer.models.families.flow.names import TRANSFORMER, Layer
from lora_trainer.models.families.sd3.architecture import Sd3Shape

FIRST_BLOCK = "joint_blocks.0.x_block.attn.qkv.weight"
SIDES = ("x_block", "context_block")
_QKV = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}
_OUT = {"x_block": "to_out.0", "context_block": "to_add_out"}
_FEED_FORWARD = {"x_block": "ff", "context_block": "ff_context"}
_NORM = {"x_block": "norm1", "context_block": "norm1_context"}
_QK_NORM = {"x_block": "norm_", "context_block": "norm_added_"}


def usual_name(name: str, names: Mapping[str, Any]) -> str:
    """The name in an all-in-one file. names: all of the file's."""
    return TRANSFORMER + name if FIRST_BLOCK in names else name


def layers(shape: Sd3Shape) -> Iterator[Layer]:
    """Every Linear layer, and the convolution that makes patches, in the order in which they run."""
    width, hidden = shape.width, shape.hidden
    yield Layer("x_embedder.proj", (("pos_embed.proj", width),))
    yield Layer("context_embedder", (("context_embedder", width),))
    for name, theirs in (("t_embedder", "timestep"), ("y_embedder", "text")):
        for place, number in ((0, 1), (2, 2)):
            yield Layer(f"{name}.mlp.{place}", ((f"time_text_embed.{theirs}_embedder.linear_{number}", width),))
    for index in range(shape.blocks):
        theirs = f"transformer_blocks.{index}"
        for side in SIDES:
            block = f"joint_blocks.{index}.{side}"
            last = side == "context_block" and index == shape.blocks - 1
            dual = side == "x_block" and index < shape.dual
            modulations = 2 if last else 9 if dual else 6
            linear = ((f"{theirs}.{_NORM[side]}.linear", modulations * width),)
            yield Layer(f"{block}.adaLN_modulation.1", linear, "projection", swapped=last)
            yield Layer(f"{block}.attn.qkv", tuple((f"{theirs}.attn.{q}", width) for q in _QKV[side]), "attention")
            if last:
                continue
            yield Layer(f"{block}.attn.proj", ((f"{theirs}.attn.{_OUT[side]}", width),), "attention")
            if dual:
                parts = tuple((f"{theirs}.attn2.{q}", width) for q in _QKV[side])
                yield Layer(f"{block}.attn2.qkv", parts, "attention")
                yield Layer(f"{block}.attn2.proj", ((f"{theirs}.attn2.{_OUT[side]}", width),), "attention")
            feed_forward = f"{theirs}.{_FEED_FORWARD[side]}.net"
            yield Layer(f"{block}.mlp.fc1", ((f"{feed_forward}.0.proj", hidden),), "feed_forward")
            yield Layer(f"{block}.mlp.fc2", ((f"{feed_forward}.2", width),), "feed_forward")
    yield Layer("final_layer.linear", (("proj_out", 4 * shape.channels),))
    yield Layer("final_layer.adaLN_modulation.1", (("norm_out.linear", 2 * width),), swapped=True)


def others(shape: Sd3Shape) -> Iterator[tuple[str, str]]:
    """What is no layer, in single files and in diffusers' words: the table of positions, and normalizations."""
    yield "pos_embed", "pos_embed.pos_embed"
    if not shape.normalized:
        return
    for index in range(shape.blocks):
        theirs = f"transformer_blocks.{index}"
        for letter in "qk":
            for side in SIDES:
                ours = f"joint_blocks.{index}.{side}.attn.ln_{letter}.weight"
                yield ours, f"{theirs}.attn.{_QK_NORM[side]}{letter}.weight"
            if index < shape.dual:
                yield f"joint_blocks.{index}.x_block.attn2.ln_{letter}.weight", f"{theirs}.attn2.norm_{letter}.weight"
