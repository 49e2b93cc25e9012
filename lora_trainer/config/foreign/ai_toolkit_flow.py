"""ai-toolkit's settings of FLUX.1, Chroma and Stable Diffusion 3 (27a03a91: toolkit/config_modules.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.config.foreign import flow
from lora_trainer.config.foreign.flow import CHROMA, FLUX, SD3
from lora_trainer.config.foreign.report import Reading, is_on, number

_SIGMAS = {"sigmoid": "sigmoid", "linear": "uniform"}
_FORMATS = {"qfloat8": "fp8", "float8": "fp8", "nf4": "nf4"}
_ALONE = "no second LoRA helps"
_SMALL = ("2", "3", "4")  # bits at the end of a format's name


def family_of(model: Any) -> str | None:
    """The family that a job is for. model: its section of this name."""
    if not isinstance(model, Mapping):
        return None
    arch = str(model.get("arch") or "").partition(":")[0].lower()
    if not arch:
        arch = FLUX if is_on(model.get("is_flux")) else SD3 if is_on(model.get("is_v3")) else ""
    return arch if arch in (FLUX, CHROMA, SD3) else None


def read_train(reading: Reading, family: str) -> None:
    """The section train, before what it has for every family."""
    settings = reading.translation.settings
    settings["sigma_sampling"] = "sigmoid"
    for name in ("linear_timesteps", "linear_timesteps2"):
        if is_on(reading.left.get(name)):
            settings["sigma_sampling"] = "uniform"
            reading.unmet(name, True, "noise levels are drawn evenly, but weigh alike")
            reading.ignore("timestep_type")
    word = str(reading.pop("timestep_type") or "").lower()
    if word in _SIGMAS:
        reading.set("timestep_type", "sigma_sampling", _SIGMAS[word])
    elif word in ("shift", "flux_shift") and family == FLUX:
        settings["sigma_sampling"] = "flux_shift"
        reading.unmet("timestep_type", word, "sigma_sampling: flux_shift takes its place, which shifts uneven levels")
    elif word:
        reading.unmet("timestep_type", word, "sigma_sampling: sigmoid takes its place")
    elif settings["sigma_sampling"] == "sigmoid":
        reading.note("timestep_type is not given: ai-toolkit takes sigmoid.")
    if "gradient_checkpointing" not in reading.left:  # which is on there
        reading.left["gradient_checkpointing"] = True
    if family == FLUX:
        reading.cannot({"bypass_guidance_embedding": flow.GUIDANCE, "do_guidance_loss": flow.GUIDANCE})
    elif is_on(reading.left.get("train_text_encoder")):
        reading.unmet("train_text_encoder", True, "its text encoders do not learn")


def read_model(reading: Reading, family: str) -> None:
    """The section model, after train."""
    if is_on(reading.left.get("quantize")):
        word, _, recovery = str(reading.pop("qtype") or "qfloat8").partition("|")
        ours = _FORMATS.get(word, "nf4" if word.endswith(_SMALL) else "fp8")
        reading.set("quantize", "base_precision", ours)
        if word not in _FORMATS:
            reading.unmet("qtype", word, f"base_precision: {ours} takes its place")
        if recovery:
            reading.unmet("qtype", recovery, _ALONE)
    if is_on(reading.left.get("layer_offloading")) or is_on(reading.left.get("auto_memory")):
        share = number(reading.left.get("layer_offloading_transformer_percent", 1.0))
        name = "layer_offloading" if "layer_offloading" in reading.left else "auto_memory"
        blocks = flow.BLOCKS.get(family)
        if blocks is None or name == "auto_memory":
            flow.set_offload(reading, name, "auto")
        elif isinstance(share, (int, float)):
            flow.set_offload(reading, name, round(share * blocks))
    reading.ignore("auto_memory", "extras_name_or_path", "te_dtype", "vae_dtype")
    reading.cannot({"attn_masking": flow.NO_MASK, "use_flux_cfg": flow.GUIDANCE, "accuracy_recovery_adapter": _ALONE})
