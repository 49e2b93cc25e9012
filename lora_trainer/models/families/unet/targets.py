"""Every layer that an adapter can attach to, under the names of the LoRA file format.

Which layers: those of kohya's sd-scripts (Linear and convolutions inside transformers, resnets and samplers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.unet.architecture import Architecture, TextShape, UNetShape
from lora_trainer.models.families.unet.binding import text_body
from lora_trainer.models.families.unet.names import (
    CLIP_LAYERS,
    TRANSFORMER_BLOCK,
    UNET,
    open_clip_table,
    rename,
    unet_table,
)

_RESNET_GROUPS = {"conv1": "conv", "conv2": "conv", "time_emb_proj": "conv_linear", "conv_shortcut": "conv_linear"}


def lora_targets(
    unet: nn.Module,
    text_encoders: Sequence[nn.Module],
    architecture: Architecture,
    names_of_file: bool,
    block_of: Callable[[str, str], int | None],
    text_prefixes: Sequence[str],
) -> list[LoraTarget]:
    """Every layer that an adapter can attach to: the UNet's, then those of the text encoders that are given.

    names_of_file: name the UNet's layers as the single file does, instead of as diffusers.
    block_of: kohya's number of a block, by both names. text_prefixes: one for each text encoder.
    """
    targets = _unet_targets(unet, architecture.unet, names_of_file, block_of)
    for index, (encoder, shape) in enumerate(zip(text_encoders, architecture.text_encoders)):
        targets += text_targets(text_body(encoder), shape, text_prefixes[index], index)
    return targets


def _unet_targets(
    unet: nn.Module, shape: UNetShape, names_of_file: bool, block_of: Callable[[str, str], int | None]
) -> list[LoraTarget]:
    """The UNet's layers, from the input to the output.

    A UNet that does not have two resnets a level gets the names of the file in any case: WebUIs count on two when they
    read diffusers' names, and know the file's names for every model.
    """
    names_of_file = names_of_file or any(layers != 2 for layers in shape.layers)
    table = unet_table(shape.layers, [bool(depth) for depth in shape.depths])
    targets = []

    def add(path: str, group: str) -> None:
        name = rename(path, table)
        if name is None:
            raise RuntimeError(f"no name in the table: {path}")
        targets.append(
            LoraTarget(
                kohya_name="lora_unet_" + (name if names_of_file else path).replace(".", "_"),
                diffusers_name=f"unet.{path}",
                checkpoint_name=UNET + name,
                part="unet",
                group=group,
                block=block_of(path, name),
                module=unet.get_submodule(path),
            )
        )

    for prefix in table:
        if ".attentions." in prefix:
            depth = _depth(prefix, shape.depths, shape.mid_depth)
            add(f"{prefix}.proj_in", "projection")
            for i in range(depth):
                for layer in TRANSFORMER_BLOCK:
                    add(f"{prefix}.transformer_blocks.{i}.{layer}", "attention" if layer[0] == "a" else "feed_forward")
            add(f"{prefix}.proj_out", "projection")
        elif "samplers." in prefix:
            add(prefix, "conv")
        elif ".resnets." in prefix:
            group = _RESNET_GROUPS.get(prefix.rsplit(".", 1)[1])
            if group is not None and _exists(unet, prefix):
                add(prefix, group)
    return targets


def text_targets(body: nn.Module, shape: TextShape, kohya: str, index: int) -> list[LoraTarget]:
    """The layers of one text encoder.

    body: see ``text_body``. kohya: prefix in the LoRA file. index: 0, or 1 for a second encoder.
    """
    part = "text_encoder" if index == 0 else "text_encoder_2"
    table = open_clip_table(shape.layers)
    targets = []
    for i in range(shape.layers):
        for layer in CLIP_LAYERS:
            path = f"encoder.layers.{i}.{layer}"
            if shape.layout == "open_clip":
                stored = rename(path, table)  # None: q, k and v are one tensor there
            else:
                stored = f"text_model.{path}"
            targets.append(
                LoraTarget(
                    kohya_name=f"{kohya}_text_model_{path}".replace(".", "_"),
                    diffusers_name=f"{part}.text_model.{path}",
                    checkpoint_name=None if stored is None else shape.prefix + stored,
                    part=part,
                    group="attention" if layer.startswith("self_attn") else "feed_forward",
                    block=None,
                    module=body.get_submodule(path),
                )
            )
    return targets


def _depth(prefix: str, depths: tuple[int, ...], mid_depth: int) -> int:
    if prefix.startswith("mid_block"):
        return mid_depth
    side, level = prefix.split(".")[:2]
    return depths[int(level)] if side == "down_blocks" else depths[::-1][int(level)]


def _exists(module: nn.Module, path: str) -> bool:
    """Whether there is such a layer; a resnet has a shortcut only where its width changes."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name, None) is not None
