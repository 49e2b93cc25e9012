"""Reads what a FLUX.1 is made of off the names and shapes of its tensors."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.flow.names import CLIP_L, TRANSFORMER
from lora_trainer.models.families.flow.shapes import clip_shape, count, t5_shape, vae_shape
from lora_trainer.models.families.flux.architecture import FluxArchitecture, FluxShape
from lora_trainer.models.families.flux.names import FIRST_BLOCK
from lora_trainer.models.family import LatentFormat, Shapes
from lora_trainer.models.other_files import other_family

TITLE = "FLUX.1"
_COMPLETE = "Choose a complete, unmodified FLUX.1 dev or schnell."


def claims(shapes: Shapes) -> bool:
    return f"{TRANSFORMER}{FIRST_BLOCK}" in shapes and other_family(shapes) == TITLE


def architecture(shapes: Shapes, name: str, latents: LatentFormat, source: str | Path) -> FluxArchitecture:
    """Raises UserError: layers are missing, or it reads more than noisy latents (Fill, Canny, Depth, Redux)."""
    try:
        transformer = _transformer(shapes)
        clip, t5 = clip_shape(shapes, CLIP_L), t5_shape(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{source} is {TITLE}, but lacks layers or has others ({error}).", field="base_model", remedy=_COMPLETE
        ) from error
    if transformer.channels != 4 * latents.channels:
        raise UserError(
            f"{source} is a {TITLE} that also reads another picture ({transformer.channels} channels), which cannot "
            "be trained here.",
            field="base_model",
            remedy=_COMPLETE,
        )
    return FluxArchitecture(name, transformer, vae_shape(shapes, latents, TITLE), clip, t5)


def check_complete(made_of: FluxArchitecture, source: str | Path) -> None:
    """Raises UserError for the first part that no file holds."""
    if made_of.vae is None:
        raise UserError(f"{source} has no VAE.", field="vae", remedy="Name FLUX's VAE (ae.safetensors) with vae: …")
    for part, file in ((made_of.clip, "CLIP-L (clip_l.safetensors)"), (made_of.t5, "T5-XXL (t5xxl_fp16.safetensors)")):
        if part is None:
            raise UserError(
                f"{source} has no text encoder {file.partition(' ')[0]}.",
                field="text_encoders",
                remedy=f"Name the file of {file} with text_encoders: …",
            )
    assert made_of.t5 is not None and made_of.clip is not None
    if (made_of.t5.width, made_of.clip.width) != (made_of.transformer.context_dim, made_of.transformer.pooled_dim):
        raise UserError(
            f"{source}: the text encoders give {made_of.t5.width} and {made_of.clip.width} values and the transformer "
            f"reads {made_of.transformer.context_dim} and {made_of.transformer.pooled_dim}; they do not belong "
            "together.",
            field="text_encoders",
        )


def _transformer(shapes: Shapes) -> FluxShape:
    def shape(name: str) -> tuple[int, ...]:
        return shapes[TRANSFORMER + name]

    width, channels = shape("img_in.weight")
    head_dim = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    return FluxShape(
        double=count(shapes, lambda i: f"{TRANSFORMER}double_blocks.{i}.img_attn.qkv.weight"),
        single=count(shapes, lambda i: f"{TRANSFORMER}single_blocks.{i}.linear1.weight"),
        width=width,
        heads=width // head_dim,
        hidden=shape("double_blocks.0.img_mlp.0.weight")[0],
        channels=channels,
        context_dim=shape("txt_in.weight")[1],
        pooled_dim=shape("vector_in.in_layer.weight")[1],
        axes=axes_of(head_dim),
        guidance=f"{TRANSFORMER}guidance_in.in_layer.weight" in shapes,
    )


def axes_of(head_dim: int) -> tuple[int, ...]:
    """Channels of a head for each axis of a position: an eighth for the first, as in FLUX's (16, 56, 56), or the next
    number with which all three are even."""
    for first in range(max(2, head_dim // 8 // 2 * 2), head_dim, 2):
        rest = (head_dim - first) // 2
        if rest % 2 == 0 and first + 2 * rest == head_dim:
            return first, rest, rest
    raise ValueError(f"heads of {head_dim} channels")
