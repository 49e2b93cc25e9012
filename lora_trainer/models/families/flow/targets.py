"""Every layer of a flow model that an adapter can attach to, under kohya's names, which are those of the file."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_trainer.models.base import LoraTarget
from lora_trainer.models.families.flow.names import TRANSFORMER, Layer


def transformer_targets(transformer: nn.Module, layers: Iterable[Layer], alpha: bool = True) -> list[LoraTarget]:
    """The layers of all blocks with their modulations. alpha: see ``LoraTarget``."""
    found = []
    for layer in layers:
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
                swapped=layer.swapped,
                alpha=alpha,
            )
        )
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]
