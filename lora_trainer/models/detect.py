"""Reads a model's architecture off the names and shapes of its tensors, and says what a file is that is not one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_trainer.errors import UserError
from lora_trainer.models.families.unet.architecture import Architecture, Hints, TextShape, UNetShape, VAEShape

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}

_CHOOSE = "Choose a Stable Diffusion 1.x, 2.x or SDXL checkpoint (.safetensors)."
_USE_FP16 = "Use the fp16, bf16 or fp32 version of this model."

# What a file is when some tensor's name matches; the first match wins. Order: the surest signs first.
_OTHER_FILES: tuple[tuple[str, str, str], ...] = (
    (r"lora_(up|down)\.weight$|\.lora[_.](A|B)\b|hada_w1|lokr_w1|\.lora\.(up|down)\.", "is a LoRA, not a base model",
     "Give it as init_lora to go on training it, and choose the base model that it was made for."),
    (r"quant_state\.bitsandbytes|\.absmax$|\.quant_map$", "is quantized (bitsandbytes nf4 or int8)", _USE_FP16),
    (r"\.(scale_weight|weight_scale|scale_input)$|^scaled_fp8$", "is quantized (scaled fp8)", _USE_FP16),
    (r"(^|\.)joint_blocks\.\d", "is Stable Diffusion 3", _CHOOSE),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.\d", "is a FLUX (or another double-stream) model", _CHOOSE),
    (r"clip_txt_(pooled_)?mapper|(^|\.)clip_mapper\.", "is Stable Cascade", _CHOOSE),
    (r"(^|\.)control_model\.|input_hint_block|controlnet_|zero_convs\.", "is a ControlNet, not a base model", _CHOOSE),
    (r"motion_modules", "is an AnimateDiff motion module, not a base model", _CHOOSE),
    (r"(^|\.)(time_stack|time_mixer|temporal_)", "is a video model", _CHOOSE),
    (r"^(emb_params|string_to_param|string_to_token|clip_[lg])$|^<.*>$", "is a textual inversion embedding", _CHOOSE),
    (r"^(image_proj|ip_adapter)\b", "is an IP-Adapter, not a base model", _CHOOSE),
    (r"^conditioner\.embedders\.0\.open_clip\.|^image_encoder\.", "is an image-conditioned model", _CHOOSE),
    (r"(^|\.)(x_embedder|y_embedder|context_refiner|patch_embedding)\.", "is a diffusion transformer (DiT) model",
     _CHOOSE),
)  # fmt: skip

# Looked at only when there is no UNet in the file.
_PARTS: tuple[tuple[str, str], ...] = (
    (r"^(first_stage_model\.)?(en|de)coder\.(conv_in|mid)", "is a VAE alone, without a UNet"),
    (r"^down_blocks\.\d+\.resnets", "is a diffusers UNet alone, without text encoders and VAE"),
    (r"^(input_blocks|output_blocks)\.\d", "is a UNet alone, without text encoders and VAE"),
    (r"text_model\.encoder\.layers|transformer\.resblocks|encoder\.block\.\d", "is a text encoder alone"),
    (r"^(params_ema|params|conv_first|model\.0)\b|RRDB", "is an upscaler"),
)

# By the number of channels that the UNet reads.
_INPUT_CHANNELS = {
    9: "is an inpainting model (9 input channels)",
    8: "is an InstructPix2Pix model (8 input channels)",
    7: "is an upscaling model (7 input channels)",
    5: "is a depth-to-image model (5 input channels)",
    16: "is not a Stable Diffusion 1, 2 or XL model (16 latent channels)",
}
_FLOATS = {"F64", "F32", "F16", "BF16"}


def detect(
    shapes: Shapes,
    *,
    dtypes: Mapping[str, str] | None = None,
    source: str | Path = "the model",
    hints: Hints | None = None,
) -> Architecture:
    """The architecture of the model whose tensors have these (single-file) names and shapes.

    dtypes: the safetensors names of the number formats, where known; quantized files are recognized by them.
    source: what to call the file in messages.

    Raises:
        UserError: it is not a Stable Diffusion 1, 2 or XL text-to-image model; the message says what it is.
    """
    hints = hints or Hints()
    _refuse_other_files(shapes, dtypes or {}, source)
    stem = shapes[f"{UNET}input_blocks.0.0.weight"]
    if stem[1] != 4:
        what = _INPUT_CHANNELS.get(stem[1], f"has a UNet with {stem[1]} input channels instead of 4")
        raise UserError(f"{source} {what}, which cannot be trained here.", remedy=_CHOOSE)
    family = _family(shapes, source)
    try:
        unet = _unet(shapes, family, hints)
        vae = vae_shape(shapes, family)
        text = tuple(
            _text(shapes, prefix, family, _nth(hints.text_heads, i))
            for i, prefix in enumerate(_text_prefixes(shapes, family, source))
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{source} has the layers of a {family.upper()} model in an order that is not known ({error}).",
            remedy="It may be pruned or distilled. " + _CHOOSE,
        ) from error
    width = sum(encoder.width for encoder in text)
    if width != unet.context_dim:
        raise UserError(
            f"{source}: the text encoders give {width} values a token and the UNet reads {unet.context_dim}; "
            "they do not belong together."
        )
    return Architecture(family, unet, vae, text)


def vae_shape(shapes: Shapes, family: str) -> VAEShape | None:
    """The VAE under ``first_stage_model.``, or None when there is none. Raises UserError for one of another family."""
    if f"{VAE}decoder.conv_in.weight" not in shapes or f"{VAE}encoder.conv_in.weight" not in shapes:
        return None
    latent_channels = shapes[f"{VAE}decoder.conv_in.weight"][1]
    if latent_channels != 4:
        raise UserError(
            f"The VAE has {latent_channels} latent channels; Stable Diffusion 1, 2 and XL have 4.", field="vae"
        )
    levels = _count(shapes, lambda i: f"{VAE}encoder.down.{i}.block.0.conv1.weight")
    layers = _count(shapes, lambda i: f"{VAE}encoder.down.0.block.{i}.conv1.weight")
    channels = tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels))
    return VAEShape(channels, layers, SCALING_FACTORS[family])


def _refuse_other_files(shapes: Shapes, dtypes: Mapping[str, str], source: str | Path) -> None:
    for pattern, what, remedy in _OTHER_FILES:
        if _any_name(shapes, pattern):
            raise UserError(f"{source} {what}.", field="base_model", remedy=remedy)
    if f"{UNET}input_blocks.0.0.weight" not in shapes or len(shapes[f"{UNET}input_blocks.0.0.weight"]) != 4:
        for pattern, what in _PARTS:
            if _any_name(shapes, pattern):
                raise UserError(f"{source} {what}.", field="base_model", remedy=_CHOOSE)
        raise UserError(f"{source} is not a Stable Diffusion model.", field="base_model", remedy=_CHOOSE)
    for name, dtype in dtypes.items():
        if name.startswith(UNET) and name.endswith(".weight") and dtype not in _FLOATS:
            what = "fp8" if dtype.startswith("F8") else dtype
            raise UserError(f"{source} is quantized ({what} weights).", field="base_model", remedy=_USE_FP16)


def _any_name(shapes: Shapes, pattern: str) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in shapes)


def _family(shapes: Shapes, source: str | Path) -> str:
    added = f"{UNET}label_emb.0.0.weight" in shapes
    if added and any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "sdxl"
    if added and any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise UserError(f"{source} is the SDXL refiner.", field="base_model", remedy="Choose the SDXL base model.")
    if f"{UNET}label_emb.weight" in shapes:
        raise UserError(f"{source} is an upscaling model.", field="base_model", remedy=_CHOOSE)
    if added:
        if not any(name.startswith(("cond_stage_model.", "conditioner.")) for name in shapes):
            raise _no_text_encoder(source)
        raise UserError(f"{source} is an SD 2 unCLIP model.", field="base_model", remedy=_CHOOSE)
    for name, shape in shapes.items():
        if name.startswith(UNET) and name.endswith(".proj_in.weight"):
            return "sd2" if len(shape) == 2 else "sd1"
    raise UserError(f"{source} has a UNet without cross-attention.", field="base_model", remedy=_CHOOSE)


def _unet(shapes: Shapes, family: str, hints: Hints) -> UNetShape:
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
    added = shapes.get(f"{UNET}label_emb.0.0.weight")
    return UNetShape(
        channels=tuple(channels),
        layers=tuple(layers),
        depths=tuple(depths),
        mid_depth=mid_depth,
        heads=_heads(channels, family, hints),
        context_dim=context,
        linear_projection=len(shapes[f"{UNET}middle_block.1.proj_in.weight"]) == 2,
        added_channels=None if added is None else added[1],
    )


def _heads(channels: list[int], family: str, hints: Hints) -> tuple[int, ...]:
    """SD 1 has 8 heads on every level, SD 2 and XL have heads of 64 channels."""
    heads = hints.num_heads
    if heads is None and hints.head_dim is None and family == "sd1":
        heads = 8
    if heads is None:
        heads = tuple(max(1, width // (hints.head_dim or 64)) for width in channels)
    elif isinstance(heads, int):
        heads = (heads,) * len(channels)
    if len(heads) != len(channels) or any(width % number for width, number in zip(channels, heads)):
        raise ValueError(f"{heads} attention heads do not fit channels {channels}")
    return heads


def _text_prefixes(shapes: Shapes, family: str, source: str | Path) -> list[str]:
    stages = ["conditioner.embedders.0.", "conditioner.embedders.1."] if family == "sdxl" else ["cond_stage_model."]
    prefixes = []
    for stage in stages:
        for marker, prefix in (("transformer.text_model.", "transformer."), ("model.transformer.", "model.")):
            if any(name.startswith(stage + marker) for name in shapes):
                prefixes.append(stage + prefix)
                break
        else:
            raise _no_text_encoder(source)
    return prefixes


def _text(shapes: Shapes, prefix: str, family: str, heads: int | None) -> TextShape:
    open_clip = prefix.endswith("model.")
    second = prefix.startswith("conditioner.embedders.1.")
    if open_clip:
        vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
        positions = shapes[f"{prefix}positional_embedding"][0]
        layers = _count(shapes, lambda i: f"{prefix}transformer.resblocks.{i}.attn.in_proj_weight")
        hidden = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
        projection = shapes[f"{prefix}text_projection"][1] if second else None
    else:
        body = f"{prefix}text_model."
        vocabulary, width = shapes[f"{body}embeddings.token_embedding.weight"]
        positions = shapes[f"{body}embeddings.position_embedding.weight"][0]
        layers = _count(shapes, lambda i: f"{body}encoder.layers.{i}.self_attn.q_proj.weight")
        hidden = shapes[f"{body}encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes[f"{prefix}text_projection.weight"][0] if second else None
    # SD 2 reads the output of the last layer but one (and LayerNorm), so that its last layer is never run; diffusers
    # folders leave it out.
    if family == "sd2" and (open_clip or layers == 24):
        layers -= 1
    laion = family == "sd2" or second
    return TextShape(
        prefix=prefix,
        layout="open_clip" if open_clip else "transformers",
        width=width,
        layers=layers,
        hidden=hidden,
        heads=heads or max(1, width // 64),
        activation="gelu" if laion else "quick_gelu",
        vocabulary=vocabulary,
        positions=positions,
        projection=projection,
        pad="zero" if laion else "eos",
    )


def _count(shapes: Shapes, name: Callable[[int], str]) -> int:
    number = 0
    while name(number) in shapes:
        number += 1
    return number


def _nth(values: tuple[int, ...] | None, index: int) -> int | None:
    return values[index] if values and index < len(values) else None


def _no_text_encoder(source: str | Path) -> UserError:
    return UserError(
        f"{source} holds a UNet but not the text encoders that belong to it.",
        field="base_model",
        remedy="Choose a complete checkpoint.",
    )
