"""The names of flow models' tensors in an all-in-one file, and in the files of text encoders that lie beside others."""

from __future__ import annotations

from dataclasses import dataclass

from lora_trainer.models.families.unet.names import UNET
from lora_trainer.models.family import Shapes

TRANSFORMER = UNET
CLIP_L = "text_encoders.clip_l.transformer."
CLIP_G = "text_encoders.clip_g.transformer."
T5 = "text_encoders.t5xxl.transformer."
_CLIP_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_T5_PARTS = ("shared.", "encoder.block.", "encoder.final_layer_norm.")
_DEEPER_THAN_CLIP_L = ".encoder.layers.12.mlp.fc1.weight"


@dataclass(frozen=True)
class Layer:
    """A layer of the transformer. name: in single files. parts: diffusers' names of what it is, and their rows.

    group: see ``LoraTarget``; "" for layers that adapters do not attach to. swapped: diffusers has its halves the other
    way round.
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    group: str = ""
    swapped: bool = False


def text_names(shapes: Shapes) -> dict[str, str]:
    """Each tensor of a text encoder's own file -> its name in an all-in-one file; without those that are not needed."""
    named = {}
    clip = CLIP_G if any(f".{name}".endswith(_DEEPER_THAN_CLIP_L) for name in shapes) else CLIP_L
    for name in shapes:
        if name.startswith(_T5_PARTS):
            named[name] = T5 + name
        elif name.startswith(("text_model.", "text_projection.")):
            named[name] = clip + name
        elif name.startswith(_CLIP_PARTS):  # transformers 5.6 and later leave the first level out
            named[name] = f"{clip}text_model.{name}"
    return named
