"""Reads the architecture of a Stable Diffusion off the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.unet.architecture import Architecture, TextShape, UNetShape, VAEShape
from lora_trainer.models.families.unet.names import UNET, VAE
from lora_trainer.models.family import Shapes
from lora_trainer.models.hints import Hints
from lora_trainer.models.other_files import INPUT_CHANNELS, USE_FP16, storage

STEM = f"{UNET}input_blocks.0.0.weight"
ADDED = f"{UNET}label_emb.0.0.weight"  # for a vector beside the text: SDXL, unCLIP
CLASSES = f"{UNET}label_emb.weight"  # for a number: upscalers
LATENT_CHANNELS = 4
_CHOOSE = "Choose a complete, unmodified checkpoint (.safetensors)."


@dataclass(frozen=True)
class TextRules:
    """A text encoder of a family.

    stage: what its tensors' names start with. open_clip: trained with open_clip, whatever the file's layout: GELU, and
    zeros as padding. projected: its pooled output is used. skips_last: the last layer of the file is never run.
    """

    stage: str
    open_clip: bool = False
    projected: bool = False
    skips_last: bool = False


def has_unet(shapes: Shapes) -> bool:
    return len(shapes.get(STEM, ())) == 4


def input_channels(shapes: Shapes) -> int:
    return shapes[STEM][1]


def linear_projections(shapes: Shapes) -> bool | None:
    """Whether the UNet's transformers begin with a Linear layer (SD 2, SDXL) or a 1×1 convolution (SD 1)."""
    found = (shape for name, shape in shapes.items() if name.startswith(UNET) and name.endswith(".proj_in.weight"))
    shape = next(found, None)
    return None if shape is None else len(shape) == 2


def refuse_storage(shapes: Shapes, dtypes: Mapping[str, str], title: str, source: str | Path) -> None:
    """Raises UserError when the weights of the UNet are stored in a form that cannot be trained on.

    title: of its family.
    """
    form = storage([name for name in shapes if name.startswith(UNET)], dtypes)
    if form is not None:
        raise UserError(
            f"{source} is {title}, {form}, which cannot be trained on.", field="base_model", remedy=USE_FP16
        )


def refusal(shapes: Shapes, source: str | Path, remedy: str) -> UserError | None:
    """What a file with a UNet is that no family claims; None for a file without one."""
    if not has_unet(shapes):
        return None
    channels = input_channels(shapes)
    if channels != LATENT_CHANNELS:
        what = INPUT_CHANNELS.get(channels, "{0} has a UNet with {1} input channels instead of 4.")
        return UserError(what.format(source, channels), remedy=remedy)
    added = ADDED in shapes
    if added and any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        return UserError(f"{source} is the SDXL refiner.", field="base_model", remedy="Choose the SDXL base model.")
    if CLASSES in shapes:
        return UserError(f"{source} is an upscaling model.", field="base_model", remedy=remedy)
    if added:
        if not any(name.startswith(("cond_stage_model.", "conditioner.")) for name in shapes):
            return no_text_encoder(source)
        return UserError(f"{source} is an SD 2 unCLIP model.", field="base_model", remedy=remedy)
    return UserError(f"{source} has a UNet without cross-attention.", field="base_model", remedy=remedy)


def no_text_encoder(source: str | Path) -> UserError:
    return UserError(
        f"{source} holds a UNet but not the text encoders that belong to it.",
        field="base_model",
        remedy="Choose a complete checkpoint.",
    )


def read_architecture(
    shapes: Shapes,
    family: str,
    text_encoders: tuple[TextRules, ...],
    *,
    scale: float,
    heads: int | None,
    source: str | Path,
    hints: Hints,
) -> Architecture:
    """scale: of the latents. heads: of every attention in the UNet, where nothing says it; None: 64 channels a head.

    Raises:
        UserError: parts are missing, in an unknown order, or do not belong together.
    """
    try:
        unet = _unet(shapes, heads, hints)
        vae = _vae(shapes, hints.latent_scale or scale)
        text = tuple(_text(shapes, rules, source, _nth(hints.text_heads, i)) for i, rules in enumerate(text_encoders))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{source} has the layers of a {family.upper()} model in an order that is not known ({error}).",
            remedy=f"It may be pruned or distilled. {_CHOOSE}",
        ) from error
    width = sum(encoder.width for encoder in text)
    if width != unet.context_dim:
        raise UserError(
            f"{source}: the text encoders give {width} values a token and the UNet reads {unet.context_dim}; "
            "they do not belong together."
        )
    return Architecture(family, unet, vae, text)


def _vae(shapes: Shapes, scale: float) -> VAEShape | None:
    """The VAE under ``first_stage_model.``, or None when there is none. Raises UserError for one of another family."""
    if f"{VAE}decoder.conv_in.weight" not in shapes or f"{VAE}encoder.conv_in.weight" not in shapes:
        return None
    latent_channels = shapes[f"{VAE}decoder.conv_in.weight"][1]
    if latent_channels != LATENT_CHANNELS:
        raise UserError(
            f"The VAE has {latent_channels} latent channels; Stable Diffusion 1, 2 and XL have 4.", field="vae"
        )
    levels = _count(shapes, lambda i: f"{VAE}encoder.down.{i}.block.0.conv1.weight")
    layers = _count(shapes, lambda i: f"{VAE}encoder.down.0.block.{i}.conv1.weight")
    channels = tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels))
    return VAEShape(channels, layers, scale)


def _unet(shapes: Shapes, default_heads: int | None, hints: Hints) -> UNetShape:
    def depth(prefix: str) -> int:
        return _count(shapes, lambda i: f"{UNET}{prefix}.transformer_blocks.{i}.norm1.weight")

    channels: list[int] = []
    layers, depths, index, new_level = [], [], 1, True
    while True:
        out = shapes.get(f"{UNET}input_blocks.{index}.0.in_layers.2.weight")
        if out is not None and new_level:
            channels.append(out[0])
            layers.append(1)
            depths.append(depth(f"input_blocks.{index}.1"))
            new_level = False
        elif out is not None:
            layers[-1] += 1
            if depth(f"input_blocks.{index}.1") != depths[-1]:
                raise ValueError(f"input block {index} differs from the others of its level")
        elif f"{UNET}input_blocks.{index}.0.op.weight" in shapes:
            new_level = True
        else:
            break
        index += 1
    mid_depth = depth("middle_block.1")
    if not mid_depth or depths[-1] not in (0, mid_depth):
        raise ValueError("the middle block differs from the lowest level")
    context = next(
        shape[1] for name, shape in shapes.items() if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")
    )
    added = shapes.get(ADDED)
    return UNetShape(
        channels=tuple(channels),
        layers=tuple(layers),
        depths=tuple(depths),
        mid_depth=mid_depth,
        heads=_heads(channels, default_heads, hints),
        context_dim=context,
        linear_projection=len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2,
        added_channels=None if added is None else added[1],
    )


def _heads(channels: list[int], default: int | None, hints: Hints) -> tuple[int, ...]:
    """default: on every level; None for heads of 64 channels."""
    heads = hints.num_heads
    if heads is None and hints.head_dim is None:
        heads = default
    if heads is None:
        heads = tuple(max(1, width // (hints.head_dim or 64)) for width in channels)
    elif isinstance(heads, int):
        heads = (heads,) * len(channels)
    if len(heads) != len(channels) or any(width % number for width, number in zip(channels, heads)):
        raise ValueError(f"{heads} attention heads do not fit channels {channels}")
    return heads


def _text_prefix(shapes: Shapes, stage: str, source: str | Path) -> str:
    for marker, prefix in (("transformer.text_model.", "transformer."), ("model.transformer.", "model.")):
        if any(name.startswith(stage + marker) for name in shapes):
            return stage + prefix
    raise no_text_encoder(source)


def _text(shapes: Shapes, rules: TextRules, source: str | Path, heads: int | None) -> TextShape:
    prefix = _text_prefix(shapes, rules.stage, source)
    open_clip = prefix.endswith("model.")
    if open_clip:
        vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
        positions = shapes[f"{prefix}positional_embedding"][0]
        layers = _count(shapes, lambda i: f"{prefix}transformer.resblocks.{i}.attn.in_proj_weight")
        hidden = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
        projection = shapes[f"{prefix}text_projection"][1] if rules.projected else None
    else:
        body = f"{prefix}text_model."
        vocabulary, width = shapes[f"{body}embeddings.token_embedding.weight"]
        positions = shapes[f"{body}embeddings.position_embedding.weight"][0]
        layers = _count(shapes, lambda i: f"{body}encoder.layers.{i}.self_attn.q_proj.weight")
        hidden = shapes[f"{body}encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes[f"{prefix}text_projection.weight"][0] if rules.projected else None
    # Diffusers folders leave out the layer that is never run.
    if rules.skips_last and (open_clip or layers == 24):
        layers -= 1
    return TextShape(
        prefix=prefix,
        layout="open_clip" if open_clip else "transformers",
        width=width,
        layers=layers,
        hidden=hidden,
        heads=heads or max(1, width // 64),
        activation="gelu" if rules.open_clip else "quick_gelu",
        vocabulary=vocabulary,
        positions=positions,
        projection=projection,
        pad="zero" if rules.open_clip else "eos",
    )


def _count(shapes: Shapes, name: Callable[[int], str]) -> int:
    number = 0
    while name(number) in shapes:
        number += 1
    return number


def _nth(values: tuple[int, ...] | None, index: int) -> int | None:
    return values[index] if values and index < len(values) else None
