"""Every layer of FLUX.1 that an adapter can attach to, under kohya's names, which are those of the file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.flow.names import TRANSFORMER
from lora_trainer.models.families.flux.architecture import FluxArchitecture
from lora_trainer.models.families.flux.names import layers
from lora_trainer.models.families.unet.binding import text_body
from lora_trainer.models.families.unet.targets import text_targets


def lora_targets(transformer: nn.Module, clip: Sequence[nn.Module], architecture: FluxArchitecture) -> list[LoraTarget]:
    """The layers of all blocks with their modulations, then those of CLIP-L where it is given."""
    found = []
    for layer in layers(architecture.transformer):
        if not layer.group:
            continue
        fused = len(layer.parts) > 1
        theirs = layer.parts[0][0].rpartition(".")[0] + (".to_qkv_mlp" if len(layer.parts) > 3 else ".to_qkv")
        found.append(
            LoraTarget(
                kohya_name="lora_unet_" + layer.name.replace(".", "_"),
                diffusers_name=f"transformer.{theirs if fused else layer.parts[0][0]}",
                checkpoint_name=TRANSFORMER + layer.name,
                part="unet",
                group=layer.group,
                block=None,
                module=transformer.get_submodule(layer.name),
                also_named=(layer.name.partition(".")[2].partition(".")[2], *(_last(name) for name, _ in layer.parts)),
                split=tuple((f"transformer.{name}", rows) for name, rows in layer.parts) if fused else (),
            )
        )
    if architecture.clip is not None:
        for encoder in clip:
            found += text_targets(text_body(encoder), architecture.clip, "lora_te1", 0)
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]
