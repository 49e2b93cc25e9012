"""Presets and saved configurations of kohya's graphical interface (kohya_ss), as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_trainer.config.foreign import kohya, kohya_flow, kohya_network
from lora_trainer.config.foreign.report import Reading, Translation, is_off, is_on, number

TOOL = "kohya's GUI (kohya_ss)"

MARKERS = {"LoRA_type", "max_resolution", "lr_warmup", "lora_network_weights", "additional_parameters",
           "num_cpu_threads_per_process", "stop_text_encoder_training", "stop_text_encoder_training_pct",
           "sdxl_no_half_vae", "LyCORIS_preset"}  # fmt: skip

# The interface shows a field for every kind; only these kinds train convolutions.
_KINDS = {
    "standard": ("lora", False),
    "flux1": ("lora", False),
    "sd3": ("lora", False),
    "kohya locon": ("lora", True),
    "lycoris/locon": ("locon", True),
    "lycoris/loha": ("loha", True),
    "lycoris/lokr": ("lokr", True),
}
_OF_THE_NETWORK = """
    conv_dim conv_alpha conv_dims conv_alphas conv_block_dims conv_block_alphas block_dims block_alphas
    down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold rank_dropout module_dropout factor dora_wd
    decompose_both use_cp use_tucker use_scalar rank_dropout_scale rescaled constrain train_norm bypass_mode
    loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio unit
""".split()


def translate(values: Mapping[str, Any], folder: Path | None, known: set[str]) -> Translation:
    translation = Translation(TOOL)
    reading = Reading(translation, values, folder=folder)
    _noise(reading)
    extra = _arguments(str(reading.pop("additional_parameters") or ""))
    if extra:
        reading.left.update(extra)  # the interface appends them to the command, where the last one counts
        reading.note(f"additional_parameters are read too: {', '.join(sorted(extra))}.")
    if "max_resolution" in reading.left:
        reading.left.setdefault("resolution", reading.pop("max_resolution"))
    reading.take("lora_network_weights", "init_lora")
    family = kohya_flow.family_of(str(reading.left.get("LoRA_type")), reading.left)
    unet_only = _network(reading, family)
    unet, text, general = (number(reading.left.get(name)) for name in ("unet_lr", "text_encoder_lr", "learning_rate"))
    if is_off(unet) and is_off(text):  # both are left to the general rate
        reading.ignore("unet_lr", "text_encoder_lr")
        text = general
    text_only = is_on(text) and is_off(unet) and "unet_lr" in reading.left
    text_only |= is_on(reading.left.get("network_train_text_encoder_only"))
    unet_only |= is_off(text) or is_on(reading.left.get("network_train_unet_only"))
    unet_only |= kohya_flow.text_encoders_idle(reading, family)
    kohya.rates(reading, unet_only=unet_only, text_encoder_only=text_only)
    kohya.optimizer(reading, "optimizer" if "optimizer" in reading.left else "optimizer_type")
    kohya.schedule(reading)
    kohya.warmup(reading, "lr_warmup_steps")
    kohya.warmup(reading, "lr_warmup", percent=True)
    _length(reading)
    prompts = reading.pop("sample_prompts")
    if prompts:
        reading.set("sample_prompts", "preview_prompts", [line.strip() for line in str(prompts).splitlines() if line])
    if (named := reading.pop("dataset_config")) is not None:
        reading.unmet("dataset_config", named, "give that file itself, or train_data_dir")
    if family is not None:
        kohya_flow.read_network(reading, reading.left)
        reading.ignore("max_token_length")  # of CLIP in Stable Diffusion alone
    kohya.common(reading, family)
    kohya_flow.read(reading, family)
    reading.ignore(*kohya.NOTHING)
    reading.cannot(kohya.CANNOT, kohya.HARMLESS)
    reading.finish(known)
    return translation


def _arguments(text: str) -> dict[str, Any]:
    """``--a=1 --b 2 --c`` -> {"a": "1", "b": "2", "c": True}, cut at spaces and without double quotes, as the interface
    does it."""
    found: dict[str, Any] = {}
    name = ""
    for word in text.replace('"', "").split():
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
        elif name:
            found[name] = word if found[name] is True else f"{found[name]} {word}"
    return found


def _noise(reading: Reading) -> None:
    """noise_offset_type says which of the two kinds of noise the interface passes on."""
    if "noise_offset_type" not in reading.left:
        return
    word = str(reading.pop("noise_offset_type") or "Original")
    idle: tuple[str, ...] = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    if word != "Multires":
        idle = ("multires_noise_iterations", "multires_noise_discount")
    if is_on(reading.left.get(idle[0])):
        reading.note(f"noise_offset_type is {word}: {idle[0]} does not count.")
    reading.ignore(*idle)


def _network(reading: Reading, family: str | None) -> bool:
    """Whether the UNet learns alone, by the preset of LyCORIS."""
    kind = str(reading.pop("LoRA_type") or "Standard")
    algorithm, convolutions = _KINDS.get(kind.lower(), (kind, False))
    arguments = {name: reading.left.pop(name) for name in _OF_THE_NETWORK if name in reading.left}
    if algorithm in ("lora",) and not convolutions:
        for name in ("conv_dim", "conv_alpha"):
            if is_on(arguments.get(name)):
                reading.note(f"{name} is not active: {kind} trains no convolutions.")
    unet_only = False
    if kind.lower().startswith("lycoris/"):
        with_them, unet_only = kohya_network.lycoris_preset(
            reading, "LyCORIS_preset", reading.pop("LyCORIS_preset"), family
        )
        convolutions = convolutions and with_them
    kohya_network.network(reading, algorithm, arguments, convolutions=convolutions, name="LoRA_type")
    return unet_only


def _length(reading: Reading) -> None:
    epoch, epochs, steps = (reading.pop(name) for name in ("epoch", "max_train_epochs", "max_train_steps"))
    if is_on(epochs):
        kohya.length(reading, epochs, None)
    elif is_on(steps):
        kohya.length(reading, None, steps)
    elif is_on(epoch):
        reading.set("epoch", "epochs", number(epoch))
