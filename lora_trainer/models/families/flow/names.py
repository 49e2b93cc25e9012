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
_T5_IN_GGUF = "enc.blk."
_FROM_GGUF = (
    ("token_embd.", "shared."), (_T5_IN_GGUF, "encoder.block."), ("enc.output_norm.", "encoder.final_layer_norm."),
    (".attn_norm.", ".layer.0.layer_norm."), (".attn_rel_b.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".attn_", ".layer.0.SelfAttention."), (".ffn_norm.", ".layer.1.layer_norm."),
    (".ffn_gate.", ".layer.1.DenseReluDense.wi_0."), (".ffn_up.", ".layer.1.DenseReluDense.wi_1."),
    (".ffn_down.", ".layer.1.DenseReluDense.wo."),
)  # fmt: skip
"""Of T5's names in GGUF files, replaced in this order (llama.cpp's gguf-py/gguf/tensor_mapping.py)."""
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
    in_gguf = any(name.startswith(_T5_IN_GGUF) for name in shapes)
    for name in shapes:
        if (usual := _from_gguf(name) if in_gguf else name).startswith(_T5_PARTS):
            named[name] = T5 + usual
        elif name.startswith(("text_model.", "text_projection.")):
            named[name] = clip + name
        elif name.startswith(_CLIP_PARTS):  # transformers 5.6 and later leave the first level out
            named[name] = f"{clip}text_model.{name}"
    return named


def _from_gguf(name: str) -> str:
    for theirs, ours in _FROM_GGUF:
        name = name.replace(theirs, ours)
    return name
