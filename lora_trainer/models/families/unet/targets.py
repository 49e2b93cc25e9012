"""Every layer that an adapter can attach to, under the names of the LoRA file format.

Which layers: those of kohya's sd-scripts (Linear and convolutions inside transformers, resnets and samplers).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_trainer.models.base import LoraTarget
from lora_trainer.models.detect import UNET
from lora_trainer.models.families.unet.architecture import Architecture, TextShape
from lora_trainer.models.families.unet.binding import build_text_encoder, build_unet, text_body
from lora_trainer.models.families.unet.names import (
    CLIP_LAYERS,
    TRANSFORMER_BLOCK,
    block_of_diffusers_name,
    block_of_sgm_name,
    open_clip_table,
    rename,
    unet_table,
)

_RESNET_GROUPS = {"conv1": "conv", "conv2": "conv", "time_emb_proj": "conv_linear", "conv_shortcut": "conv_linear"}


def lora_targets(unet: nn.Module, text_encoders: Sequence[nn.Module], architecture: Architecture) -> list[LoraTarget]:
    """Every layer that an adapter can attach to: the UNet's, then those of the text encoders that are given."""
    targets = _unet_targets(unet, architecture)
    for index, (encoder, shape) in enumerate(zip(text_encoders, architecture.text_encoders)):
        targets += _text_targets(text_body(encoder), shape, architecture.family, index)
    return targets


def targets_of(architecture: Architecture) -> list[LoraTarget]:
    """The layers of a model that is not there: their names and shapes, without weights."""
    encoders = [build_text_encoder(shape)[0] for shape in architecture.text_encoders]
    return lora_targets(build_unet(architecture.unet)[0], encoders, architecture)


def _unet_targets(unet: nn.Module, architecture: Architecture) -> list[LoraTarget]:
    """The UNet's layers, from the input to the output. SDXL's have the names of the file, the others diffusers'.

    So has a UNet that does not have two resnets a level: WebUIs count on that when they read diffusers' names, and
    know the file's names for every model.
    """
    shape = architecture.unet
    sgm = architecture.family == "sdxl"
    names_of_file = sgm or any(layers != 2 for layers in shape.layers)
    table = unet_table(shape.layers, [bool(depth) for depth in shape.depths])
    targets = []

    def add(path: str, group: str) -> None:
        name = rename(path, table)
        if name is None:
            raise RuntimeError(f"{path} has no name in the table")
        targets.append(
            LoraTarget(
                kohya_name="lora_unet_" + (name if names_of_file else path).replace(".", "_"),
                diffusers_name=f"unet.{path}",
                checkpoint_name=UNET + name,
                part="unet",
                group=group,
                block=block_of_sgm_name(name) if sgm else block_of_diffusers_name(path),
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


def _text_targets(body: nn.Module, shape: TextShape, family: str, index: int) -> list[LoraTarget]:
    """The layers of one text encoder. ``body``: see ``text_body``. ``index``: 0, or 1 for SDXL's second."""
    part = "text_encoder" if index == 0 else "text_encoder_2"
    kohya = f"lora_te{index + 1}" if family == "sdxl" else "lora_te"
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
