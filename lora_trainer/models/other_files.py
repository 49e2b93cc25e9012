"""What a file is that is no base model to train on, by the names and number formats of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from lora_trainer.models.gguf import PREFIX as GGUF

USE_FP16 = "Use the fp16, bf16 or fp32 version of this model."

# What a file is when some tensor's name matches; the first match wins. Order: the surest signs first. {0}: the file.
OTHER_FILES: tuple[tuple[str, str, str | None], ...] = (
    (r"lora_(up|down)\.weight$|\.lora[_.](A|B)\b|hada_w1|lokr_w1|\.lora\.(up|down)\.",
     "{0} is a LoRA, not a base model.",
     "Give it as init_lora to go on training it, and choose the base model that it was made for."),
    (r"(^|\.)control_model\.|input_hint_block|controlnet_|zero_convs\.",
     "{0} is a ControlNet, not a base model.", None),
    (r"motion_modules", "{0} is an AnimateDiff motion module, not a base model.", None),
    (r"^(emb_params|string_to_param|string_to_token|clip_[lg])$|^<.*>$", "{0} is a textual inversion embedding.", None),
    (r"^(image_proj|ip_adapter)\b", "{0} is an IP-Adapter, not a base model.", None),
    (r"^conditioner\.embedders\.0\.open_clip\.|^image_encoder\.", "{0} is an image-conditioned model.", None),
)  # fmt: skip

# Families that cannot be trained here, by the names that Forge, ComfyUI and diffusers know them by. Those that have
# others' names beside their own come before them: Chroma and the video models before FLUX.
OTHER_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)joint_blocks\.\d", "Stable Diffusion 3"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma"),
    (r"(^|\.)(individual_token_refiner|byt5_in)\b", "a Hunyuan model"),
    (r"(^|\.)double_stream_modulation_img\.", "FLUX.2"),
    (r"(^|\.)double_stream_blocks\.\d", "HiDream"),
    (r"(^|\.)double_layers\.\d", "AuraFlow"),
    (r"(^|\.)(txt_norm\.|transformer_blocks\.\d+\.img_mod\.)", "Qwen-Image"),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.\d", "FLUX.1"),
    (r"clip_txt_(pooled_)?mapper|(^|\.)clip_mapper\.", "Stable Cascade"),
    (r"(^|\.)encoder_hid_proj\.", "Kolors"),
    (r"(^|\.)(mlp_t5\.|pooler\.positional_embedding$)", "Hunyuan-DiT"),
    (r"(^|\.)patchify_proj\.", "LTX-Video"),
    (r"(^|\.)t5_yproj\.", "Mochi"),
    (r"(^|\.)(head\.modulation$|blocks\.\d+\.cross_attn\.norm_k\.)", "Wan"),
    (r"(^|\.)(t_block\.1\.|adaln_single\.)", "PixArt"),
    (r"(^|\.)(noise_refiner|context_refiner)\.\d", "Lumina or Z-Image"),
    (r"(^|\.)attention_y_norm\.", "Sana"),
    (r"(^|\.)(time_stack|time_mixer|temporal_)", "a video model"),
    (r"(^|\.)(x_embedder|y_embedder|patch_embedding)\.", "a diffusion transformer (DiT) model"),
)

# The same by what a GGUF file calls itself (general.architecture), beside the names of the families trained here.
GGUF_FAMILIES = {
    "flux": "FLUX.1", "aura": "AuraFlow", "hidream": "HiDream",
    "qwen_image": "Qwen-Image", "lumina2": "Lumina or Z-Image", "ltxv": "LTX-Video", "hyvid": "a Hunyuan model",
    "wan": "Wan", "cosmos": "a video model",
}  # fmt: skip

# Tensors that lie beside quantized weights.
_QUANTIZED: tuple[tuple[str, str], ...] = (
    (r"quant_state\.bitsandbytes__nf4", "bitsandbytes nf4"),
    (r"quant_state\.bitsandbytes__fp4", "bitsandbytes fp4"),
    (r"quant_state\.bitsandbytes|\.absmax$|\.quant_map$|\.SCB$", "bitsandbytes"),
    (r"\.(scale_weight|weight_scale|scale_input)$|(^|\.)scaled_fp8$", "scaled fp8"),
    (r"\.(wscales|smooth_factor)$", "SVDQuant"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
)
_FLOATS = {"F64", "F32", "F16", "BF16"}

# Looked at only when there is no UNet in the file.
PARTS: tuple[tuple[str, str], ...] = (
    (r"^(first_stage_model\.)?(en|de)coder\.(conv_in|mid)", "{0} is a VAE alone, without a UNet."),
    (r"^down_blocks\.\d+\.resnets", "{0} is a diffusers UNet alone, without text encoders and VAE."),
    (r"^(input_blocks|output_blocks)\.\d", "{0} is a UNet alone, without text encoders and VAE."),
    (r"text_model\.encoder\.layers|transformer\.resblocks|enc(oder\.block|\.blk)\.\d",
     "{0} is a text encoder alone."),
    (r"^(model\.layers|blk)\.\d+\.(self_attn|attn_)", "{0} is a language model."),
    (r"^(params_ema|params|conv_first|model\.0)\b|RRDB", "{0} is an upscaler."),
)

# By the number of channels that the UNet reads.
INPUT_CHANNELS = {
    9: "{0} is an inpainting model (9 input channels), which cannot be trained here.",
    8: "{0} is an InstructPix2Pix model (8 input channels), which cannot be trained here.",
    7: "{0} is an upscaling model (7 input channels), which cannot be trained here.",
    5: "{0} is a depth-to-image model (5 input channels), which cannot be trained here.",
    16: "{0} is not a Stable Diffusion 1, 2 or XL model (16 latent channels), which cannot be trained here.",
}


def other_file(names: Iterable[str]) -> tuple[str, str | None] | None:
    """What the file {0} is and the remedy, None for "choose a base model"; None where no name gives it away."""
    return next(((what, remedy) for pattern, what, remedy in OTHER_FILES if _any_name(names, pattern)), None)


def other_family(names: Iterable[str]) -> str | None:
    """The family of a model that cannot be trained here; None where no name gives it away."""
    return _other_family(tuple(names))


@lru_cache(maxsize=8)
def _other_family(names: tuple[str, ...]) -> str | None:
    """A run asks for its model's several times, and each time is tens of thousands of searches."""
    return next((family for pattern, family in OTHER_FAMILIES if _any_name(names, pattern)), None)


def part_of_model(names: Iterable[str]) -> str | None:
    """Which part of a model the file {0} holds alone, as a sentence."""
    return next((what for pattern, what in PARTS if _any_name(names, pattern)), None)


def storage(names: Iterable[str], dtypes: Mapping[str, str]) -> str | None:
    """How weights are stored that cannot be trained on, for a sentence on their file; None for usual ones.

    dtypes: number formats by name, as ``Source`` has them.
    """
    for pattern, what in _QUANTIZED:
        if _any_name(names, pattern):
            return f"quantized ({what})"
    kinds = Counter(dtypes[name] for name in names if name.endswith(".weight") and name in dtypes)
    coarse = {kind: count for kind, count in kinds.items() if kind.removeprefix(GGUF) not in _FLOATS}
    if not coarse and not any(kind.startswith(GGUF) for kind in kinds):
        return None
    kind = max(coarse or kinds, key=lambda kind: kinds[kind])
    if kind.startswith(GGUF):
        return f"in a GGUF file ({kind.removeprefix(GGUF)} weights)"
    return f"quantized ({'fp8' if kind.startswith('F8') else kind} weights)"


def _any_name(names: Iterable[str], pattern: str) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in names)
