"""OneTrainer's settings of FLUX.1, Chroma and Stable Diffusion 3 (23df3832: modules/util/config/TrainConfig.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.config.foreign import flow
from lora_trainer.config.foreign.flow import CHROMA, FLUX, SD3
from lora_trainer.config.foreign.report import Reading, is_on, number

_FAMILIES = {"FLUX_DEV_1": FLUX, "CHROMA_1": CHROMA, "STABLE_DIFFUSION_3": SD3, "STABLE_DIFFUSION_35": SD3}
_STORED = ("", "NONE", "FLOAT_16", "BFLOAT_16", "FLOAT_32", "TFLOAT_32", "GGUF")
_FORMATS = {"FLOAT_8": "fp8", "NFLOAT_4": "nf4"}


def family_of(values: Mapping[str, Any]) -> str | None:
    return _FAMILIES.get(str(values.get("model_type", "")).upper())


def read(reading: Reading, family: str) -> None:
    """What these families have of their own, before what all have: the transformer takes the UNet's place."""
    part = _part(reading, "transformer")
    reading.left["unet"] = {name: part.left.pop(name) for name in ("learning_rate", "train", "stop_training_after",
                            "stop_training_after_unit") if name in part.left}  # fmt: skip
    checkpointing = part.pop("gradient_checkpointing")
    if "gradient_checkpointing" not in reading.left:  # which is on there
        reading.left["gradient_checkpointing"] = "OFF" if checkpointing is False else "ON"
    _precision(part)
    _levels(reading, family)
    if family == FLUX:
        flow.unless(part, {"guidance_scale": flow.GUIDANCE}, 1)
        flow.unless(reading, {"text_encoder_2_sequence_length": flow.LENGTH}, 256)
        second = _part(reading, "text_encoder_2")
        if is_on(second.left.get("train")):
            second.unmet("train", True, flow.NO_T5)
    else:
        text = reading.left.get("text_encoder")
        reading.left["text_encoder"] = {**(text if isinstance(text, Mapping) else {}), "train": False}
    part.cannot({"attention_mask": flow.NO_MASK})
    share = number(part.pop("offload_fraction") or reading.left.get("layer_offload_fraction"))
    if is_on(share) and isinstance(share, (int, float)):
        reading.translation.settings["gradient_checkpointing"] = reading.left["gradient_checkpointing"] != "OFF"
        blocks = flow.BLOCKS.get(family)
        flow.set_offload(part, "offload_fraction", "auto" if blocks is None else round(share * blocks))
    layers = str(reading.left.get("layer_filter_preset") or "full")
    if layers == "attn-mlp":
        reading.set("layer_filter_preset", "target_modules", ["attention", "feed_forward"])
    elif layers == "full":
        reading.note("Of the transformer's layers those of the blocks learn.")
    if layers in ("attn-mlp", "full", "blocks"):
        reading.ignore("layer_filter", "layer_filter_preset")
    reading.ignore("quantization")


def _part(reading: Reading, name: str) -> Reading:
    given = reading.left.pop(name, None)
    return Reading(reading.translation, given if isinstance(given, Mapping) else {}, f"{name}.")


def _precision(part: Reading) -> None:
    word = str(part.pop("weight_dtype") or "").upper()
    if word in _FORMATS:
        part.set("weight_dtype", "base_precision", _FORMATS[word])
    elif word not in _STORED:
        part.translation.settings["base_precision"] = "fp8"
        part.unmet("weight_dtype", word, "base_precision: fp8 takes its place")


def _levels(reading: Reading, family: str) -> None:
    word = str(reading.pop("timestep_distribution") or "UNIFORM").upper()
    shift = number(reading.pop("timestep_shift"))
    shift = shift if isinstance(shift, (int, float)) and shift > 0 else 1
    dynamic = is_on(reading.pop("dynamic_timestep_shifting")) and family == FLUX
    bent = word == "LOGIT_NORMAL" and any(is_on(reading.left.get(one)) for one in ("noising_weight", "noising_bias"))
    if word not in ("UNIFORM", "LOGIT_NORMAL"):
        reading.unmet("timestep_distribution", word, "the model's usual sigma_sampling takes its place")
    elif dynamic and word == "LOGIT_NORMAL":
        reading.set("timestep_distribution, dynamic_timestep_shifting", "sigma_sampling", "flux_shift")
    elif dynamic:
        reading.translation.settings["sigma_sampling"] = "flux_shift"
        reading.unmet("timestep_distribution", word, "sigma_sampling: flux_shift takes its place")
    else:
        normal = word == "LOGIT_NORMAL"
        flow.set_levels(reading, "timestep_distribution", word, normal=normal, shift=shift, by="timestep_shift")
    if bent:
        reading.cannot(dict.fromkeys(("noising_weight", "noising_bias"), "σ comes from a standard normal"))
    reading.ignore("noising_weight", "noising_bias")
