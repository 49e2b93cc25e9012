"""Reads what a FLUX.1 is made of off the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.flux.architecture import FluxArchitecture, FluxShape, T5Shape
from lora_trainer.models.families.flux.names import CLIP, FIRST_BLOCK, T5, TRANSFORMER
from lora_trainer.models.families.unet.architecture import TextShape, VAEShape
from lora_trainer.models.families.unet.names import VAE
from lora_trainer.models.family import LatentFormat, Shapes
from lora_trainer.models.gguf import can_be_read
from lora_trainer.models.other_files import other_family, storage

TITLE = "FLUX.1"
_COMPLETE = "Choose a complete, unmodified FLUX.1 dev or schnell."


def claims(shapes: Shapes) -> bool:
    return f"{TRANSFORMER}{FIRST_BLOCK}" in shapes and other_family(shapes) == TITLE


def refuse_storage(shapes: Shapes, dtypes: Mapping[str, str], source: str | Path) -> None:
    """Raises UserError when the weights of the transformer are stored in a form that cannot be trained on."""
    names = [name for name in shapes if name.startswith(TRANSFORMER)]
    form = storage(names, dtypes)
    if form is None or "fp8" in form:
        return
    if not all(can_be_read(dtypes.get(name, "")) for name in names):
        raise UserError(
            f"{source} is {TITLE}, {form}, which cannot be trained on.",
            field="base_model",
            remedy="Use the bf16, fp16, fp8 or a GGUF (Q8_0, Q6_K, Q5_…, Q4_…) version of this model.",
        )


def architecture(shapes: Shapes, name: str, latents: LatentFormat, source: str | Path) -> FluxArchitecture:
    """Raises UserError: layers are missing, or it reads more than noisy latents (Fill, Canny, Depth, Redux)."""
    try:
        transformer = _transformer(shapes)
        clip, t5 = _clip(shapes), _t5(shapes)
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
    return FluxArchitecture(name, transformer, _vae(shapes, latents), clip, t5)


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
        double=_count(shapes, lambda i: f"{TRANSFORMER}double_blocks.{i}.img_attn.qkv.weight"),
        single=_count(shapes, lambda i: f"{TRANSFORMER}single_blocks.{i}.linear1.weight"),
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


def _vae(shapes: Shapes, latents: LatentFormat) -> VAEShape | None:
    """None where there is none. Raises UserError for another family's."""
    first = shapes.get(f"{VAE}decoder.conv_in.weight")
    if first is None or f"{VAE}encoder.conv_in.weight" not in shapes:
        return None
    if first[1] != latents.channels:
        raise UserError(
            f"The VAE has {first[1]} latent channels; {TITLE}'s has {latents.channels}.",
            field="vae",
            remedy="Choose FLUX's VAE (ae.safetensors).",
        )
    levels = _count(shapes, lambda i: f"{VAE}encoder.down.{i}.block.0.conv1.weight")
    return VAEShape(
        channels=tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers=_count(shapes, lambda i: f"{VAE}encoder.down.0.block.{i}.conv1.weight"),
        scaling_factor=latents.scale,
        shift=latents.shift,
        latent_channels=latents.channels,
        quant=f"{VAE}quant_conv.weight" in shapes,
    )


def _clip(shapes: Shapes) -> TextShape | None:
    body = f"{CLIP}text_model."
    if f"{body}embeddings.token_embedding.weight" not in shapes:
        return None
    vocabulary, width = shapes[f"{body}embeddings.token_embedding.weight"]
    return TextShape(
        prefix=CLIP,
        layout="transformers",
        width=width,
        layers=_count(shapes, lambda i: f"{body}encoder.layers.{i}.self_attn.q_proj.weight"),
        hidden=shapes[f"{body}encoder.layers.0.mlp.fc1.weight"][0],
        heads=max(1, width // 64),
        activation="quick_gelu",
        vocabulary=vocabulary,
        positions=shapes[f"{body}embeddings.position_embedding.weight"][0],
        projection=None,
        pad="eos",
    )


def _t5(shapes: Shapes) -> T5Shape | None:
    if f"{T5}shared.weight" not in shapes:
        return None
    vocabulary, width = shapes[f"{T5}shared.weight"]
    first = f"{T5}encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return T5Shape(
        prefix=T5,
        width=width,
        layers=_count(shapes, lambda i: f"{T5}encoder.block.{i}.layer.0.SelfAttention.q.weight"),
        inner=shapes[f"{first}.0.SelfAttention.q.weight"][0],
        heads=heads,
        hidden=shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        vocabulary=vocabulary,
        buckets=buckets,
    )


def _count(shapes: Shapes, name: Callable[[int], str]) -> int:
    number = 0
    while name(number) in shapes:
        number += 1
    return number
