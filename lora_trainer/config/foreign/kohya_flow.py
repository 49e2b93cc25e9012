"""kohya's settings of FLUX.1, Chroma and Stable Diffusion 3, those of flux_train_network and sd3_train_network.

Meanings and defaults are those of sd-scripts 48d368fa: library/flux_train_utils.py, library/sd3_train_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_trainer.config.foreign import flow
from lora_trainer.config.foreign.flow import CHROMA, FLUX, SD3
from lora_trainer.config.foreign.report import Reading, is_off, is_on, number

_MODULES = {"networks.lora_flux": FLUX, "networks.lora_sd3": SD3, "flux1": FLUX, "sd3": SD3}
_NORMAL = "σ comes from a standard normal"
_KNOWN = ("uniform", "none", "logit_normal")

_DIMS = """
    img_attn_dim txt_attn_dim img_mlp_dim txt_mlp_dim img_mod_dim txt_mod_dim single_dim single_mod_dim
    context_attn_dim context_mlp_dim context_mod_dim x_attn_dim x_mlp_dim x_mod_dim network_reg_dims
""".split()
NETWORK = {
    **dict.fromkeys(_DIMS, "lora_rank is the same in every layer"),
    "in_dims": "only layers of the blocks learn",
    "emb_dims": "only layers of the blocks learn",
    "network_reg_lrs": "all layers have one learning rate",
    "ggpo_beta": "weights are not disturbed",
    "ggpo_sigma": "weights are not disturbed",
    "train_double_block_indices": "give the blocks as target_modules, such as /double_blocks_[0-3]_/",
    "train_single_block_indices": "give the blocks as target_modules, such as /single_blocks_[0-3]_/",
    "train_block_indices": "give the blocks as target_modules, such as /joint_blocks_[0-3]_/",
    "split_qkv": "q, k and v are one layer, which has one LoRA",
    "train_t5xxl": flow.NO_T5,
}
"""Arguments of the network that cannot be honored, beside train_blocks; the interface writes them beside the others."""

_CANNOT = {
    "clip_l_dropout_rate": "use caption_dropout",
    "clip_g_dropout_rate": "use caption_dropout",
    "t5_dropout_rate": "use caption_dropout",
    "pos_emb_random_crop_rate": "positions are cut out of the middle",
    "enable_scaled_pos_embed": "positions are cut out of the middle",
    "apply_lg_attn_mask": flow.NO_MASK,
    "controlnet_model_name_or_path": "pictures are learned without a control picture",
}
_SWAPPED_APART = ("double_blocks_to_swap", "single_blocks_to_swap")
_HARMLESS = {"train_double_block_indices": "all", "train_single_block_indices": "all", "train_block_indices": "all"}
_NOTHING = """
    model_type cpu_offload_checkpointing t5xxl_device t5xxl_dtype flux1_cache_text_encoder_outputs
    flux1_cache_text_encoder_outputs_to_disk sd3_cache_text_encoder_outputs sd3_cache_text_encoder_outputs_to_disk
    flux_fused_backward_pass sd3_fused_backward_pass mem_eff_save enable_all_linear sd3_text_encoder_batch_size
    text_encoder_batch_size use_t5xxl_cache_only mode_scale
""".split()

INSTEAD = {
    "ae": "use vae", "clip_l": "use text_encoders", "clip_g": "use text_encoders", "t5xxl": "use text_encoders",
    "blocks_to_swap": "use offload_blocks", "timestep_sampling": "use sigma_sampling",
    "weighting_scheme": "use sigma_sampling", "discrete_flow_shift": "use sigma_shift",
    "training_shift": "use sigma_shift",
}  # fmt: skip
"""What a person who writes such a setting into a file of ours wants."""

NAMES = {
    *INSTEAD, *NETWORK, *_CANNOT, *_NOTHING, *_SWAPPED_APART, "sd3_clip_l", "sd3_clip_g", "sd3_t5xxl",
    "logit_mean", "logit_std", "sigmoid_scale", "model_prediction_type", "guidance_scale", "apply_t5_attn_mask",
    "t5xxl_max_token_length",
}  # fmt: skip
"""Settings of these families, which the interface writes for every model."""


def family_of(module: str, values: Mapping[str, Any]) -> str | None:
    """The family that the settings are for. module: kohya's network module, or the interface's kind."""
    chroma = str(values.get("model_type", "")).lower() == CHROMA
    if (found := _MODULES.get(module.lower())) is not None:
        return CHROMA if chroma else found
    if "flux1_checkbox" in values or "sd3_checkbox" in values:  # the interface keeps the files of another family
        return SD3 if is_on(values.get("sd3_checkbox")) else FLUX if is_on(values.get("flux1_checkbox")) else None
    if chroma:
        return CHROMA
    return SD3 if is_on(values.get("clip_g")) else FLUX if is_on(values.get("ae")) else None


def text_encoders_idle(reading: Reading, family: str | None) -> bool:
    """Whether no text encoder learns, whatever the settings say."""
    if family == SD3 and is_off(reading.left.get("network_train_unet_only")):
        reading.note("The text encoders of Stable Diffusion 3 do not learn.")
    return family in (CHROMA, SD3)


def read(reading: Reading, family: str | None) -> None:
    """Everything but the network's arguments, after what is common to all families. family: None ignores it all."""
    if family is None:
        reading.ignore(*NAMES)
        return
    _files(reading, family)
    _memory(reading, family)
    _levels(reading, family)
    _prompts(reading, family)
    reading.cannot(_CANNOT)
    reading.ignore(*_NOTHING)


def read_network(reading: Reading, arguments: dict[str, Any], prefix: str = "") -> None:
    """The network's arguments, which are taken out of ``arguments``."""
    names = ("train_blocks", "verbose", *NETWORK)
    inner = Reading(reading.translation, {name: arguments.pop(name) for name in names if name in arguments}, prefix)
    word = str(inner.left.get("train_blocks") or "all")
    if word in ("double", "single"):
        inner.take("train_blocks", "target_modules", lambda word: [f"/{word}_blocks/"])
    inner.ignore("train_blocks", "verbose")
    inner.cannot(NETWORK, _HARMLESS)


def _files(reading: Reading, family: str) -> None:
    found = {}
    for name in ("clip_l", "clip_g", "t5xxl"):
        ours = f"sd3_{name}" if family == SD3 and is_on(reading.left.get(f"sd3_{name}")) else name
        path = reading.pop(ours)
        if path is not None and not (family == CHROMA and name == "clip_l"):
            found[ours] = str(path)
    reading.ignore("sd3_clip_l", "sd3_clip_g", "sd3_t5xxl")
    if found:
        reading.set(", ".join(found), "text_encoders", list(found.values()))
    reading.take_unless_off("ae", "vae")


def _memory(reading: Reading, family: str) -> None:
    for name in ("fp8_base_unet", "fp8_base"):
        reading.take_unless_off(name, "base_precision", lambda value: "fp8")
    name = "split_mode" if is_off(reading.left.get("blocks_to_swap")) else "blocks_to_swap"
    swapped = 18 if name == "split_mode" else number(reading.left.get(name))  # as sd-scripts reads split_mode
    if is_on(reading.left.get(name)) and isinstance(swapped, int):
        # Of FLUX.1's, half of the number in double blocks, and two single blocks for each of the other half.
        flow.set_offload(reading, name, swapped if family == SD3 else swapped // 2 + 2 * (swapped - swapped // 2))
    for name in _SWAPPED_APART:
        if is_on(reading.left.get(name)):
            flow.set_offload(reading, name, "auto")
    reading.ignore("blocks_to_swap", "split_mode", *_SWAPPED_APART)


def _levels(reading: Reading, family: str) -> None:
    """How σ is drawn: by timestep_sampling; by weighting_scheme where that is sigma, and in Stable Diffusion 3."""
    shift = _number(reading, "training_shift" if family == SD3 else "discrete_flow_shift", 1 if family == SD3 else 3)
    if family != SD3:
        for name, usual in (("timestep_sampling", "sigma"), ("model_prediction_type", "sigma_scaled")):
            if name not in reading.left:
                reading.left[name] = usual
                reading.note(f"{name} is not given: sd-scripts takes {usual}.")
        flow.unless(reading, {"model_prediction_type": "the loss is that of the model's own prediction"}, "raw")
    else:
        reading.note("sd-scripts weighs the noise levels of Stable Diffusion 3 by their square; here they weigh alike.")
    word = "sigma" if family == SD3 else str(reading.pop("timestep_sampling") or "sigma").lower()
    if word in ("sigmoid", "shift", "flux_shift"):
        reading.set("timestep_sampling", "sigma_sampling", word)
        if word == "shift":
            reading.set("discrete_flow_shift", "sigma_shift", shift)
        flow.unless(reading, {"sigmoid_scale": _NORMAL}, 1)
    elif word == "uniform":
        reading.set("timestep_sampling", "sigma_sampling", "uniform")
    elif word == "sigma":
        _by_scheme(reading, shift, "training_shift" if family == SD3 else "discrete_flow_shift")
    else:
        reading.unmet("timestep_sampling", word, "the model's usual sigma_sampling takes its place")
    reading.ignore("weighting_scheme", "logit_mean", "logit_std", "sigmoid_scale", "discrete_flow_shift",
                   "training_shift", "timestep_sampling", "model_prediction_type")  # fmt: skip


def _by_scheme(reading: Reading, shift: float, by: str) -> None:
    word = str(reading.pop("weighting_scheme") or "uniform").lower()
    normal = word in ("logit_normal", "mode")
    reason = "logit_normal takes its place" if word == "mode" else "" if word in _KNOWN else flow.ALIKE
    flow.set_levels(reading, "weighting_scheme", word, normal=normal, shift=shift, by=by, reason=reason)
    if word == "logit_normal":
        flow.unless(reading, {"logit_mean": _NORMAL}, 0)
        flow.unless(reading, {"logit_std": _NORMAL}, 1)


def _number(reading: Reading, name: str, usual: float) -> float:
    value = number(reading.pop(name))
    return value if isinstance(value, (int, float)) and value > 0 else usual


def _prompts(reading: Reading, family: str) -> None:
    if family == FLUX:
        for name, usual in (("t5xxl_max_token_length", 512), ("guidance_scale", 3.5)):
            if name not in reading.left:
                reading.left[name] = usual
                reading.note(f"{name} is not given: sd-scripts takes {usual} for FLUX.1 dev.")
    if family != CHROMA:  # whose prompts are not filled up, which is what a mask is for
        reading.cannot({"apply_t5_attn_mask": flow.NO_MASK})
        flow.unless(reading, {"t5xxl_max_token_length": flow.LENGTH}, 256)
    if family == FLUX:
        flow.unless(reading, {"guidance_scale": flow.GUIDANCE}, 1)
    reading.ignore("apply_t5_attn_mask", "t5xxl_max_token_length", "guidance_scale")
