"""Reads what the VAE and the text encoders of a flow model are made of off the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.flow.architecture import T5Shape
from lora_trainer.models.families.flow.names import CLIP_G, T5, TRANSFORMER
from lora_trainer.models.families.unet.architecture import TextShape, VAEShape
from lora_trainer.models.families.unet.names import VAE
from lora_trainer.models.family import LatentFormat, Shapes
from lora_trainer.models.gguf import USE_READABLE, can_be_read
from lora_trainer.models.other_files import storage


def refuse_storage(shapes: Shapes, dtypes: Mapping[str, str], source: str | Path, title: str) -> None:
    """Raises UserError when the weights of the transformer are stored in a form that cannot be trained on."""
    names = [name for name in shapes if name.startswith(TRANSFORMER)]
    form = storage(names, dtypes)
    if form is None or "fp8" in form:
        return
    if not all(can_be_read(dtypes.get(name, "")) for name in names):
        raise UserError(
            f"{source} is {title}, {form}, which cannot be trained on.",
            field="base_model",
            remedy=USE_READABLE,
        )


def vae_shape(shapes: Shapes, latents: LatentFormat, title: str) -> VAEShape | None:
    """None where there is none. Raises UserError for another family's."""
    first = shapes.get(f"{VAE}decoder.conv_in.weight")
    if first is None or f"{VAE}encoder.conv_in.weight" not in shapes:
        return None
    if first[1] != latents.channels:
        raise UserError(
            f"The VAE has {first[1]} latent channels; {title}'s has {latents.channels}.",
            field="vae",
            remedy=f"Choose the VAE of {title}.",
        )
    levels = count(shapes, lambda i: f"{VAE}encoder.down.{i}.block.0.conv1.weight")
    return VAEShape(
        channels=tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers=count(shapes, lambda i: f"{VAE}encoder.down.0.block.{i}.conv1.weight"),
        scaling_factor=latents.scale,
        shift=latents.shift,
        latent_channels=latents.channels,
        quant=f"{VAE}quant_conv.weight" in shapes,
    )


def clip_shape(shapes: Shapes, prefix: str) -> TextShape | None:
    """Of CLIP-L or CLIP-G in transformers' layout; None where it is not there. No WebUI projects CLIP-L's pooled
    output, even where the file has a matrix for it."""
    body, is_large = f"{prefix}text_model.", prefix == CLIP_G
    if f"{body}embeddings.token_embedding.weight" not in shapes:
        return None
    vocabulary, width = shapes[f"{body}embeddings.token_embedding.weight"]
    return TextShape(
        prefix=prefix,
        layout="transformers",
        width=width,
        layers=count(shapes, lambda i: f"{body}encoder.layers.{i}.self_attn.q_proj.weight"),
        hidden=shapes[f"{body}encoder.layers.0.mlp.fc1.weight"][0],
        heads=max(1, width // 64),
        activation="gelu" if is_large else "quick_gelu",
        vocabulary=vocabulary,
        positions=shapes[f"{body}embeddings.position_embedding.weight"][0],
        projection=shapes[f"{prefix}text_projection.weight"][0] if is_large else None,
        pad="zero" if is_large else "eos",
    )


def t5_shape(shapes: Shapes) -> T5Shape | None:
    embedding = next((name for name in ("shared", "encoder.embed_tokens") if f"{T5}{name}.weight" in shapes), None)
    if embedding is None:
        return None
    vocabulary, width = shapes[f"{T5}{embedding}.weight"]
    first = f"{T5}encoder.block.0.layer"
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return T5Shape(
        prefix=T5,
        width=width,
        layers=count(shapes, lambda i: f"{T5}encoder.block.{i}.layer.0.SelfAttention.q.weight"),
        inner=shapes[f"{first}.0.SelfAttention.q.weight"][0],
        heads=heads,
        hidden=shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        vocabulary=vocabulary,
        buckets=buckets,
        embedding=embedding,
    )


def count(shapes: Shapes, name: Callable[[int], str]) -> int:
    number = 0
    while name(number) in shapes:
        number += 1
    return number
