"""What a file is that is no base model to train on, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

USE_FP16 = "Use the fp16, bf16 or fp32 version of this model."

# What a file is when some tensor's name matches; the first match wins. Order: the surest signs first.
OTHER_FILES: tuple[tuple[str, str, str | None], ...] = (
    (r"lora_(up|down)\.weight$|\.lora[_.](A|B)\b|hada_w1|lokr_w1|\.lora\.(up|down)\.", "is a LoRA, not a base model",
     "Give it as init_lora to go on training it, and choose the base model that it was made for."),
    (r"quant_state\.bitsandbytes|\.absmax$|\.quant_map$", "is quantized (bitsandbytes nf4 or int8)", USE_FP16),
    (r"\.(scale_weight|weight_scale|scale_input)$|^scaled_fp8$", "is quantized (scaled fp8)", USE_FP16),
    (r"(^|\.)joint_blocks\.\d", "is Stable Diffusion 3", None),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.\d", "is a FLUX (or another double-stream) model", None),
    (r"clip_txt_(pooled_)?mapper|(^|\.)clip_mapper\.", "is Stable Cascade", None),
    (r"(^|\.)control_model\.|input_hint_block|controlnet_|zero_convs\.", "is a ControlNet, not a base model", None),
    (r"motion_modules", "is an AnimateDiff motion module, not a base model", None),
    (r"(^|\.)(time_stack|time_mixer|temporal_)", "is a video model", None),
    (r"^(emb_params|string_to_param|string_to_token|clip_[lg])$|^<.*>$", "is a textual inversion embedding", None),
    (r"^(image_proj|ip_adapter)\b", "is an IP-Adapter, not a base model", None),
    (r"^conditioner\.embedders\.0\.open_clip\.|^image_encoder\.", "is an image-conditioned model", None),
    (r"(^|\.)(x_embedder|y_embedder|context_refiner|patch_embedding)\.", "is a diffusion transformer (DiT) model",
     None),
)  # fmt: skip

# Looked at only when there is no UNet in the file.
PARTS: tuple[tuple[str, str], ...] = (
    (r"^(first_stage_model\.)?(en|de)coder\.(conv_in|mid)", "is a VAE alone, without a UNet"),
    (r"^down_blocks\.\d+\.resnets", "is a diffusers UNet alone, without text encoders and VAE"),
    (r"^(input_blocks|output_blocks)\.\d", "is a UNet alone, without text encoders and VAE"),
    (r"text_model\.encoder\.layers|transformer\.resblocks|encoder\.block\.\d", "is a text encoder alone"),
    (r"^(params_ema|params|conv_first|model\.0)\b|RRDB", "is an upscaler"),
)

# By the number of channels that the UNet reads.
INPUT_CHANNELS = {
    9: "is an inpainting model (9 input channels)",
    8: "is an InstructPix2Pix model (8 input channels)",
    7: "is an upscaling model (7 input channels)",
    5: "is a depth-to-image model (5 input channels)",
    16: "is not a Stable Diffusion 1, 2 or XL model (16 latent channels)",
}


def other_file(names: Iterable[str]) -> tuple[str, str | None] | None:
    """What the file is and the remedy, None for "choose a base model"; None where no name gives it away."""
    return next(((what, remedy) for pattern, what, remedy in OTHER_FILES if _any_name(names, pattern)), None)


def part_of_model(names: Iterable[str]) -> str | None:
    """Which part of a model the file holds alone."""
    return next((what for pattern, what in PARTS if _any_name(names, pattern)), None)


def _any_name(names: Iterable[str], pattern: str) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in names)
