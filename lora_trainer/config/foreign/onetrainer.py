"""Presets and configurations of OneTrainer, as JSON: flat ones of earlier versions, and those with parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lora_trainer.config.foreign import onetrainer_flow
from lora_trainer.config.foreign.kohya import resolution
from lora_trainer.config.foreign.report import (
    Reading,
    Translation,
    choice,
    computed,
    find,
    is_off,
    is_on,
    number,
    section,
    sections,
)
from lora_trainer.config.yaml_text import file_text
from lora_trainer.errors import UserError, shown

TOOL = "OneTrainer"
MARKERS = {"training_method", "concept_file_name", "learning_rate_scheduler", "output_model_destination",
           "base_model_name"}  # fmt: skip

# What OneTrainer does where a setting is not given, and this program would do otherwise.
DEFAULTS = {"learning_rate_scheduler": "CONSTANT", "learning_rate_warmup_steps": 200, "epochs": 100,
            "lora_alpha": 1.0, "lora_rank": 16, "layer_filter_preset": "full"}  # fmt: skip

SAME = {
    "epochs": "epochs", "batch_size": "batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lora_rank": "lora_rank", "dropout_probability": "dropout", "aspect_ratio_bucketing": "enable_bucket",
    "offset_noise_weight": "noise_offset", "perturbation_noise_weight": "input_perturbation",
    "masked_training": "use_masks", "clip_grad_norm": "max_grad_norm", "tensorboard": "tensorboard",
    "lora_decompose": "dora", "seed": "seed",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw": "adamw", "adamw_8bit": "adamw8bit", "adamw_adv": "adamw", "lion": "lion", "lion_8bit": "lion",
    "prodigy": "prodigy", "adafactor": "adafactor", "adam": "adamw", "adam_8bit": "adamw8bit",
}  # fmt: skip
_SCHEDULERS = {
    "constant": "constant", "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_hard_restarts": "cosine_with_restarts", "adafactor": "constant",
}  # fmt: skip
_NETWORKS = {"lora": "lora", "loha": "loha", "lokr": "lokr"}
_TRAIN_DTYPES = {"float_16": "fp16", "bfloat_16": "bf16", "float_32": "no", "tfloat_32": "no"}
_SAVE_DTYPES = {"float_16": "fp16", "bfloat_16": "bf16", "float_32": "fp32"}
_SETTINGS_OF_OPTIMIZERS = {
    "adamw": ("weight_decay", "eps"), "adamw8bit": ("weight_decay", "eps"), "lion": ("weight_decay",),
    "prodigy": ("weight_decay", "eps", "d0", "d_coef", "growth_rate", "decouple", "use_bias_correction",
                "safeguard_warmup", "slice_p"),
    "adafactor": ("weight_decay", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step",
                  "warmup_init"),
}  # fmt: skip

CANNOT = {
    "timestep_distribution": "noise levels are drawn evenly",
    "noising_weight": "noise levels are drawn evenly", "noising_bias": "noise levels are drawn evenly",
    "mae_strength": "use loss: huber", "log_cosh_strength": "use loss: huber", "huber_strength": "use loss: huber",
    "mse_strength": "use loss", "vb_loss_strength": "the model predicts no variance",
    "unmasked_probability": "outside a mask nothing is learned", "unmasked_weight": "outside a mask nothing is learned",
    "normalize_masked_area_loss": "the loss is the mean over the whole picture",
    "masked_prior_preservation_weight": "outside a mask nothing is learned",
    "learning_rate_min_factor": "the rate falls to 0",
    "learning_rate_scaler": "the rate is that of learning_rate, whatever the batch",
    "loss_scaler": "the loss is the mean over the batch",
    "custom_learning_rate_scheduler": "only the built-in schedules are known",
    "scheduler_params": "the schedules have no further arguments",
    "force_epsilon_prediction": "it is read off the model; v_prediction: false says so too",
    "generalized_offset_noise": "use noise_offset", "random_rotate_and_crop": "pictures are not turned",
    "train_unet_epochs": "the UNet learns to the end",
    "train_text_encoder_epochs": "the text encoders learn as long as the UNet",
    "lora_decompose_norm_epsilon": "it is always there", "lora_decompose_output_axis": "magnitudes are per input",
    "additional_embeddings": "embeddings are not trained", "embedding": "embeddings are not trained",
    "validation": "pictures are not held out", "force_circular_padding": "the base model is trained as it is",
    "continue_last_backup": "states of other trainers are not read",
    "custom_conditioning_image": "pictures are learned alone",
    "circular_mask_generation": "masks are not made", "text_encoder_2_layer_skip": "SDXL reads its usual layers",
    "quantization": "the base model is not quantized",
}  # fmt: skip
HARMLESS = {
    "timestep_distribution": "UNIFORM", "mse_strength": 1, "vb_loss_strength": 1, "unmasked_probability": 0.1,
    "unmasked_weight": 0.1, "learning_rate_scaler": "NONE", "loss_scaler": "NONE", "train_unet_epochs": 100000,
    "noising_bias": 0.5, "lora_decompose_norm_epsilon": True,
}  # fmt: skip
NOTHING = """
    __version debug_mode debug_dir workspace_dir tensorboard_expose tensorboard_always_on tensorboard_port
    validate_after validate_after_unit prevent_overwrites include_train_config model_type training_method
    peft_type weight_dtype output_model_format async_offloading gradient_checkpointing_offload
    layer_offload_fraction enable_activation_offloading enable_async_offloading force_attention_mask compile
    latent_caching image_caching text_caching latent_caching_epochs clear_cache_before_training caching_threads
    dataloader_threads prefetch_next_batch temp_device fallback_train_dtype enable_autocast_cache only_cache
    frames attention_mechanism multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce
    async_gradient_reduce async_gradient_reduce_buffer ema_update_step_interval loss_weight_strength huber_delta
    timestep_shift dynamic_timestep_shifting prior transformer unconditional_transformer text_encoder_3
    text_encoder_4 text_encoder_3_layer_skip text_encoder_4_layer_skip text_encoder_sequence_length
    text_encoder_2_sequence_length effnet_encoder decoder decoder_text_encoder decoder_vqgan
    embedding_learning_rate preserve_embedding_norm embedding_weight_dtype embedding_weight_dtypes cloud secrets
    rolling_backup rolling_backup_count backup_after backup_after_unit backup_before_save save_filename_prefix
    save_skip_first sample_image_format sample_video_format sample_audio_format samples_to_tensorboard
    non_ema_sampling sample_skip_first optimizer_defaults text_encoder_weight_dtype unet_weight_dtype
    vae_weight_dtype text_encoder_2_weight_dtype prior_weight_dtype extra_model_name lora_weight_dtype token_count
    initial_embedding_text placeholder lora_layers lora_layer_preset bundle_additional_embeddings align_prop
    align_prop_weight dispatcher layer_filter_regex noise_scheduler effnet_encoder_weight_dtype
    decoder_weight_dtype decoder_text_encoder_weight_dtype decoder_vqgan_weight_dtype concepts_hash
""".split()


def translate(values: Mapping[str, Any], folder: Path | None, known: set[str]) -> Translation:
    """Raises UserError for what trains no LoRA."""
    method = str(values.get("training_method", "LORA")).upper()
    if method != "LORA":
        raise UserError(
            f"{method} is no training of a LoRA.", field="training_method", remedy="Choose LORA in OneTrainer."
        )
    translation = Translation(TOOL)
    reading = Reading(translation, values, folder=folder)
    for name, earlier in (("layer_filter_preset", "lora_layer_preset"), ("layer_filter", "lora_layers")):
        if earlier in reading.left:
            reading.left.setdefault(name, reading.left.pop(earlier))
    for name, value in DEFAULTS.items():
        if name not in reading.left and not (name == "layer_filter_preset" and reading.left.get("layer_filter")):
            reading.left[name] = value
            reading.note(f"{name} is not given: OneTrainer takes {value}.")
    reading.take("base_model_name", "base_model")
    if (family := onetrainer_flow.family_of(reading.left)) is not None:
        onetrainer_flow.read(reading, family)
    _output(reading)
    choice(_NETWORKS, reading, "peft_type", "adapter", "lora")
    reading.take("lora_alpha", "alpha", number)
    reading.take("lora_model_name", "init_lora")
    reading.take_all(SAME)
    reading.take("resolution", "resolution", lambda value: _size(reading, value))
    if "train_dtype" in reading.left:
        choice(_TRAIN_DTYPES, reading, "train_dtype", "mixed_precision", "auto")
    choice(_SAVE_DTYPES, reading, "output_dtype", "save_precision", "fp16")
    device = str(reading.pop("train_device") or "auto")
    reading.set("train_device", "device", "auto" if device.startswith("cuda") else device)
    checkpointing = str(reading.pop("gradient_checkpointing") or "OFF")
    reading.set("gradient_checkpointing", "gradient_checkpointing", checkpointing.upper() not in ("OFF", "FALSE"))
    _optimizer(reading)
    _schedule(reading)
    _parts(reading)
    _loss(reading)
    _layers(reading)
    _saves(reading)
    _concepts(reading)
    _samples(reading)
    reading.ignore(*NOTHING)
    reading.cannot(CANNOT, HARMLESS)
    reading.finish(known - {"concepts", "samples"})
    return translation


def _output(reading: Reading) -> None:
    target = PurePath(str(reading.pop("output_model_destination") or "models/lora.safetensors").replace("\\", "/"))
    reading.set("output_model_destination", "output_dir", str(target.parent / target.stem))
    reading.set("output_model_destination", "output_name", target.stem)
    reading.take("cache_dir", "cache_dir")


def _size(reading: Reading, value: Any) -> str:
    """``"512"``, ``"768x512"``; of several with commas, which OneTrainer trains beside each other, the largest."""
    sizes = [part.strip() for part in str(value).split(",") if part.strip()]
    if len(sizes) > 1:
        reading.note(f"Pictures are trained in one size: the largest of {', '.join(sizes)}.")
    return resolution(max(sizes, key=lambda size: float("".join(c for c in size.split("x")[0] if c.isdecimal()) or 0)))


def _optimizer(reading: Reading) -> None:
    given = reading.pop("optimizer")
    inner = dict(given) if isinstance(given, Mapping) else {"optimizer": given}
    if "weight_decay" in reading.left:
        inner.setdefault("weight_decay", reading.pop("weight_decay"))
    word = str(inner.get("optimizer") or "ADAMW")
    parts = Reading(reading.translation, {"optimizer": word})
    if word.upper().startswith("DADAPT"):
        parts.translation.settings["optimizer"] = "prodigy"
        parts.unmet("optimizer", word, "optimizer: prodigy takes its place, which finds its own learning rate too")
    else:
        choice(_OPTIMIZERS, parts, "optimizer", "optimizer", "adamw", "; look whether the learning rate fits it")
    ours = reading.translation.settings["optimizer"]
    arguments = {name: inner[name] for name in _SETTINGS_OF_OPTIMIZERS[ours] if inner.get(name) is not None}
    if ours != "adafactor" and inner.get("beta1") is not None and inner.get("beta2") is not None:
        arguments["betas"] = [inner["beta1"], inner["beta2"]]
    if arguments:
        Reading(reading.translation, {}, "optimizer.").set(", ".join(arguments), "optimizer_args", arguments)


def _schedule(reading: Reading) -> None:
    choice(_SCHEDULERS, reading, "learning_rate_scheduler", "lr_scheduler", "constant")
    reading.take("learning_rate_cycles", "lr_cycles", number)
    warmup = number(reading.pop("learning_rate_warmup_steps"))
    if is_on(warmup):
        share = isinstance(warmup, float) and warmup < 1
        reading.set("learning_rate_warmup_steps", "lr_warmup_ratio" if share else "lr_warmup_steps", warmup)
    reading.take_unless_off("rescale_noise_scheduler_to_zero_terminal_snr", "zero_terminal_snr", is_on)
    reading.take_unless_off("force_v_prediction", "v_prediction", is_on)
    reading.take_unless_off("min_noising_strength", "min_timestep", _timestep)
    reading.take_unless_off("max_noising_strength", "max_timestep", lambda value: _timestep(value, -1))
    skip = number(reading.pop("text_encoder_layer_skip"))
    if is_on(skip):
        reading.set("text_encoder_layer_skip", "clip_skip", computed(skip, lambda layers: layers + 1))
    ema, decay = reading.pop("ema"), reading.pop("ema_decay")
    if is_on(ema):
        reading.set("ema", "ema_decay", decay or 0.999)


def _timestep(strength: Any, more: int = 0) -> Any:
    return computed(strength, lambda share: round(1000 * share) + more)


def _parts(reading: Reading) -> None:
    """Which of UNet and text encoders learn, and how fast; earlier versions wrote that flat."""
    general = number(reading.pop("learning_rate"))
    unet, text, second, vae = (
        section(reading.pop(name), name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")
    )
    flat = {name: reading.pop(name) for name in ("train_unet", "unet_learning_rate", "train_text_encoder",
                                                 "text_encoder_learning_rate", "train_text_encoder_2",
                                                 "text_encoder_2_learning_rate")}  # fmt: skip
    rate = unet.get("learning_rate") or flat["unet_learning_rate"] or general
    if rate is not None:
        reading.set("unet.learning_rate" if rate != general else "learning_rate", "learning_rate", rate)
    if rate != general and general is not None:
        reading.note(f"The UNet's own rate ({rate}) counts, not learning_rate ({general}).")
    if unet.get("train", flat["train_unet"]) is False:
        reading.set("unet.train", "target_modules", [])
    learns = text.get("train", flat["train_text_encoder"])
    learns = True if learns is None else is_on(learns)
    reading.set("text_encoder.train", "train_text_encoder", learns)
    if learns:
        reading.set("text_encoder.learning_rate", "text_encoder_lr",
                    text.get("learning_rate") or flat["text_encoder_learning_rate"] or general)  # fmt: skip
    if "XL" in str(reading.left.get("model_type", "")) and second.get("train", learns) != learns:
        reading.unmet("text_encoder_2.train", second.get("train"), "both text encoders learn, or none")
    if text.get("dropout_probability"):
        reading.set("text_encoder.dropout_probability", "caption_dropout", text["dropout_probability"])
    for part, name in ((unet, "unet"), (text, "text_encoder")):
        if (
            part.get("train") is not False
            and part.get("stop_training_after_unit") not in (None, "NEVER")
            and (part.get("stop_training_after"))
        ):
            reading.unmet(f"{name}.stop_training_after", part["stop_training_after"], "all parts learn to the end")
    if vae.get("model_name"):
        reading.set("vae.model_name", "vae", vae["model_name"])


def _loss(reading: Reading) -> None:
    word, strength = str(reading.pop("loss_weight_fn") or "CONSTANT"), reading.left.get("loss_weight_strength", 5.0)
    settings = reading.translation.settings
    settings["min_snr_gamma"] = None
    if word == "MIN_SNR_GAMMA":
        reading.set("loss_weight_fn", "min_snr_gamma", strength)
    elif word == "DEBIASED_ESTIMATION":
        reading.set("loss_weight_fn", "debiased_estimation", True)
    elif word != "CONSTANT":
        reading.unmet("loss_weight_fn", word, "all noise levels weigh alike")


def _layers(reading: Reading) -> None:
    """OneTrainer's "full" trains the convolutions as well, with the rank of the others."""
    preset, layers = str(reading.pop("layer_filter_preset") or ""), str(reading.pop("layer_filter") or "")
    settings = reading.translation.settings
    if preset == "attn-only":
        reading.set("layer_filter_preset", "target_modules", ["attention"])
    elif preset == "full" and not layers:
        reading.set("layer_filter_preset", "conv_rank", settings.get("lora_rank"))
        settings["conv_alpha"] = settings.get("alpha")
        reading.note("Of OneTrainer's full set the layers that tell the time step are not trained.")
    elif layers and preset != "attn-mlp" and layers not in ("attentions", "attn"):
        reading.unmet("layer_filter", layers, "give the layers as target_modules")


def _saves(reading: Reading) -> None:
    every = {"STEP": 1, "EPOCH": 1}
    for value, unit, steps, epochs in (
        ("save_every", "save_every_unit", "save_steps", "save_epochs"),
        ("save_after", "save_after_unit", "save_steps", "save_epochs"),
        ("sample_after", "sample_after_unit", "preview_steps", ""),
    ):
        number_of, word = reading.pop(value), str(reading.pop(unit) or "NEVER").upper()
        if is_off(number_of) or word in ("NEVER", "ALWAYS"):
            continue
        ours = steps if word == "STEP" else epochs
        if word in every and ours:
            reading.set(value, ours, number(number_of))
        elif value.startswith("sample"):
            reading.note("Previews are drawn when the LoRA is saved; give preview_steps for more of them.")
        else:
            reading.unmet(value, f"{number_of} {word}", "the LoRA is saved every so many steps or epochs")


def _concepts(reading: Reading) -> None:
    concepts, named = reading.pop("concepts"), reading.pop("concept_file_name")
    if not concepts:
        concepts = _json_list(named, reading.folder)
        if concepts is None:
            reading.unmet("concept_file_name", named, "give the folder as train_data_dir")
            return
    concepts = [one for one in sections(concepts, "concepts") if one.get("enabled", True)]
    training = [one for one in concepts if not _is_validation(one)]
    if not training:
        raise UserError("names no folder with pictures.", field="concepts", remedy="Give a concept its path.")
    first, *others = training
    inner = Reading(reading.translation, first, "concepts.")
    inner.take("path", "train_data_dir")
    inner.set("balancing", "repeats", _repeats(first))
    text, image = (section(first.get(name), f"concepts.{name}") for name in ("text", "image"))
    of_text = Reading(reading.translation, text, "concepts.text.")
    of_text.take("enable_tag_shuffling", "shuffle_tags", is_on)
    if is_on(text.get("enable_tag_shuffling")):
        of_text.take("keep_tags_count", "keep_tokens", number)
    if is_on(text.get("tag_dropout_enable")):
        of_text.take("tag_dropout_probability", "tag_dropout", number)
    if text.get("prompt_source") == "concept":
        of_text.unmet("prompt_path", text.get("prompt_path"), "write <picture>.txt beside each picture, or a table")
    of_image = Reading(reading.translation, image, "concepts.image.")
    of_image.take("enable_random_flip", "flip", is_on)
    for name in ("enable_random_rotate", "enable_random_brightness", "enable_random_contrast",
                 "enable_random_saturation", "enable_random_hue"):  # fmt: skip
        if is_on(image.get(name)):
            of_image.unmet(name, True, "pictures are not changed in training, but mirrored and cropped")
    if others:
        folders = [f"{_repeats(one)}_={one.get('path')}" for one in others]
        inner.set("path", "more_folders", folders)


def _is_validation(concept: Mapping[str, Any]) -> bool:
    return bool(concept.get("validation_concept")) or concept.get("type") == "VALIDATION"


def _repeats(concept: Mapping[str, Any]) -> int:
    given = concept.get("balancing", concept.get("repeats")) or 1
    repeats = computed(given, lambda times: max(1, round(times)))
    if not isinstance(repeats, int):
        raise UserError(f"{shown(given)} is not a number.", field="concepts.balancing", remedy="Give it as a number.")
    return repeats


def _samples(reading: Reading) -> None:
    samples, named = reading.pop("samples"), reading.pop("sample_definition_file_name")
    if not samples:
        samples = _json_list(named, reading.folder)
    prompts = []
    for one in sections(samples, "samples"):
        if one.get("enabled", True) and one.get("prompt"):
            flags = [
                (one.get("width"), "w"),
                (one.get("height"), "h"),
                (one.get("diffusion_steps"), "s"),
                (one.get("cfg_scale"), "l"),
                (one.get("seed"), "d"),
                (one.get("negative_prompt"), "n"),
            ]
            prompts.append(str(one["prompt"]) + "".join(f" --{flag} {value}" for value, flag in flags if value))
    if prompts:
        reading.set("samples", "preview_prompts", prompts)


def _json_list(named: Any, folder: Path | None) -> list[Any] | None:
    path = find(named, folder)
    if path is None:
        return None
    try:
        values = json.loads(file_text(path))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, list) else None
