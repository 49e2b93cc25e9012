"""What kohya's scripts and their graphical interface have in common: the names and meanings of their settings."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lora_trainer.config.foreign.report import Reading, choice, computed, is_off, is_on, number

_LONGEST_LITERAL = 1000  # characters; Python needs much memory for a long nested one

SAME = {
    "pretrained_model_name_or_path": "base_model",
    "vae": "vae",
    "train_data_dir": "train_data_dir",
    "reg_data_dir": "reg_data_dir",
    "prior_loss_weight": "prior_loss_weight",
    "bucket_no_upscale": "bucket_no_upscale",
    "min_bucket_reso": "min_bucket_resolution",
    "max_bucket_reso": "max_bucket_resolution",
    "enable_bucket": "enable_bucket",
    "flip_aug": "flip",
    "random_crop": "random_crop",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tokens",
    "caption_extension": "caption_extension",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "weighted_captions": "weighted_captions",
    "max_token_length": "max_token_length",
    "mixed_precision": "mixed_precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "batch_size",
    "network_dropout": "dropout",
    "max_grad_norm": "max_grad_norm",
    "noise_offset": "noise_offset",
    "multires_noise_iterations": "multires_noise_iterations",
    "ip_noise_gamma": "input_perturbation",
    "debiased_estimation_loss": "debiased_estimation",
    "huber_c": "huber_c",
    "output_dir": "output_dir",
    "output_name": "output_name",
    "tensorboard": "tensorboard",
}
"""The same thing under another name: zero and false mean the same here."""

UNLESS_OFF = {
    "clip_skip": "clip_skip",
    "seed": "seed",
    "save_every_n_steps": "save_steps",
    "save_every_n_epochs": "save_epochs",
    "save_last_n_epochs": "keep_checkpoints",
    "sample_every_n_steps": "preview_steps",
    "validation_split": "validation_share",
    "validate_every_n_steps": "validation_steps",
    "lr_scheduler_num_cycles": "lr_cycles",
    "lr_scheduler_power": "lr_power",
    "multires_noise_discount": "multires_noise_discount",
    "training_comment": "description",
    "metadata_description": "description",
    "network_weights": "init_lora",
    "zero_terminal_snr": "zero_terminal_snr",
    "v_parameterization": "v_prediction",
    "scale_weight_norms": "scale_weight_norms",
    "secondary_separator": "secondary_separator",
}
"""The same, where zero, false or an empty text mean that it is not used; here that is an empty value."""

OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "lion": "lion", "lion8bit": "lion",
    "pagedlion8bit": "lion", "prodigy": "prodigy", "adafactor": "adafactor", "pagedadamw": "adamw",
}  # fmt: skip
SCHEDULERS = {
    "constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear",
    "cosine_with_restarts": "cosine_with_restarts", "polynomial": "polynomial", "adafactor": "constant",
}  # fmt: skip
LOSSES = {"l2": "mse", "mse": "mse", "huber": "huber", "smooth_l1": "smooth_l1"}
SAVE_PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "float": "fp32", "fp32": "fp32"}

CANNOT = {
    "color_aug": "colors are not changed in training",
    "face_crop_aug_range": "pictures are not cropped to faces",
    "caption_dropout_every_n_epochs": "use caption_dropout",
    "caption_prefix": "write it into the captions; trigger_word is put in front",
    "caption_suffix": "write it into the captions",
    "caption_separator": "captions are separated by commas",
    "keep_tokens_separator": "it is ||| here",
    "token_warmup_min": "all parts of a caption are trained from the first step",
    "token_warmup_step": "all parts of a caption are trained from the first step",
    "adaptive_noise_scale": "use noise_offset",
    "noise_offset_random_strength": "noise_offset is always of the same strength",
    "ip_noise_gamma_random_strength": "input_perturbation is always of the same strength",
    "scale_v_pred_loss_like_noise_pred": "use min_snr_gamma",
    "v_pred_like_loss": "the loss is that of the model's own prediction",
    "huber_schedule": "the schedule is snr",
    "stop_text_encoder_training": "the text encoders learn as long as the UNet",
    "stop_text_encoder_training_pct": "the text encoders learn as long as the UNet",
    "fused_backward_pass": "gradients are clipped and accumulated as a whole",
    "loraplus_lr_ratio": "both halves of a LoRA have one learning rate",
    "loraplus_unet_lr_ratio": "both halves of a LoRA have one learning rate",
    "loraplus_text_encoder_lr_ratio": "both halves of a LoRA have one learning rate",
    "dim_from_weights": "give lora_rank as the LoRA has it",
    "base_weights": "merge them into the base model first",
    "base_weights_multiplier": "merge them into the base model first",
    "resume": "states of other trainers are not read; give the LoRA as init_lora",
    "resume_from_huggingface": "states are not fetched from a server",
    "save_n_epoch_ratio": "use save_epochs",
    "train_norm": "normalization layers do not learn",
    "rank_dropout_scale": "what is left after dropout is not scaled",
    "use_scalar": "the LoRA has no trainable factor",
    "rescaled": "the LoRA has no trainable factor",
    "constrain": "use scale_weight_norms",
    "decompose_both": "LoKr takes its larger factor apart only",
    "use_cp": "convolutions are not taken apart further",
    "use_tucker": "convolutions are not taken apart further",
    "use_conv_cp": "convolutions are not taken apart further",
    "block_alphas": "alpha is the same share of the rank in every block",
    "conv_block_dims": "conv_rank is the same in every block",
    "conv_block_alphas": "conv_rank is the same in every block",
    "block_lr_zero_threshold": "0 freezes a block",
    "unit": "this kind of network is not made here",
    "in_json": "use metadata_path with a .jsonl or .csv",
    "dataset_class": "data is read by this program",
    "skip_image_resolution": "small pictures are not left out",
    "resize_interpolation": "pictures are resized by area and Lanczos",
    "lr_scheduler_args": "the schedules have no further arguments",
    "lr_scheduler_type": "only the built-in schedules are known",
    "lr_decay_steps": "the rate falls over the whole run",
    "lr_scheduler_min_lr_ratio": "the rate falls to 0",
    "train_blocks": "only the layers of target_modules learn",
    "initial_epoch": "a run begins at its first step",
    "initial_step": "a run begins at its first step",
}  # fmt: skip
HARMLESS = {
    "huber_schedule": "snr", "keep_tokens_separator": "|||", "caption_separator": ",", "unit": 1,
    "face_crop_aug_range": "1.0,1.0", "block_lr_zero_threshold": 0, "token_warmup_min": 1,
    "base_weights_multiplier": 1, "train_blocks": "all", "stop_text_encoder_training": -1,
}  # fmt: skip

NOTHING = """
    xformers sdpa mem_eff_attn cache_latents cache_latents_to_disk vae_batch_size no_half_vae sdxl_no_half_vae
    cache_text_encoder_outputs cache_text_encoder_outputs_to_disk sdxl_cache_text_encoder_outputs
    max_data_loader_n_workers persistent_data_loader_workers num_cpu_threads_per_process num_machines
    num_processes multi_gpu gpu_ids main_process_port lowram lowvram highvram full_fp16 full_bf16 fp8_base
    fp8_base_unet no_token_padding noise_offset_type save_model_as save_state save_state_on_train_end
    save_state_to_huggingface save_last_n_steps save_last_n_steps_state save_last_n_epochs_state save_as_bool
    no_metadata logging_dir log_with log_prefix log_tracker_name log_tracker_config log_config wandb_run_name
    wandb_api_key use_wandb huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
    huggingface_repo_visibility async_upload dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic
    torch_compile extra_accelerate_launch_args ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph deepspeed
    offload_optimizer_device zero_stage metadata_author metadata_title metadata_license metadata_tags model_list
    sdxl v2 sd3_checkbox flux1_checkbox train_on_input save_clip save_t5xxl sample_sampler sample_at_first
    sample_every_n_epochs tokenizer_cache_dir disable_mmap_load_safetensors skip_cache_check debug_dataset
    output_config config_file console_log_level console_log_file console_log_simple prompt network_train_unet_only
    network_train_text_encoder_only cache_info bypass_mode split_mode validation_seed LyCORIS_preset folder_names
    accelerate_path skip_until_initial_step vae_slicing
""".split()
"""How another program computes, logs and stores; here that is decided otherwise and changes no result."""


def common(reading: Reading, family: str | None = None) -> None:
    """Everything that both tools name alike, but the network, the learning rates and the length."""
    bucket_step(reading, family)
    reading.take_all(SAME)
    for theirs, ours in UNLESS_OFF.items():
        convert = number
        if theirs in ("zero_terminal_snr", "v_parameterization"):
            convert = is_on
        reading.take_unless_off(theirs, ours, convert)
    _timesteps(reading)
    choice(LOSSES, reading, "loss_type", "loss", "mse")
    choice(SAVE_PRECISIONS, reading, "save_precision", "save_precision", "fp16")
    if is_on(reading.left.get("min_snr_gamma")) and is_on(reading.translation.settings.get("debiased_estimation")):
        reading.unmet("min_snr_gamma", reading.left["min_snr_gamma"], "debiased_estimation takes its place")
        reading.translation.settings["min_snr_gamma"] = None
    elif is_on(reading.left.get("min_snr_gamma")):
        reading.take("min_snr_gamma", "min_snr_gamma")
    else:
        reading.ignore("min_snr_gamma")
        reading.translation.settings["min_snr_gamma"] = None
    for mask in ("masked_loss", "alpha_mask"):
        if is_on(reading.left.get(mask)):
            reading.take(mask, "use_masks", is_on)
        reading.ignore(mask)
    if "resolution" in reading.left:
        reading.take("resolution", "resolution", resolution)
    if is_on(reading.left.get("sample_every_n_epochs")):
        reading.note("Previews are drawn every preview_steps, or when the LoRA is saved; not every so many epochs.")


def bucket_step(reading: Reading, family: str | None) -> None:
    """Rounded up to what the model's latents allow."""
    multiple = 8 if family is None else 16
    step = number(reading.left.get("bucket_reso_steps"))
    if isinstance(step, int) and step > 0 and step % multiple:
        rounded = step + multiple - step % multiple
        reading.note(f"bucket_reso_steps {step} becomes {rounded}: sides are multiples of {multiple} pixels.")
        reading.left["bucket_reso_steps"] = rounded
    reading.take("bucket_reso_steps", "bucket_step")


def _timesteps(reading: Reading) -> None:
    """kohya draws up to, and without, max_timestep."""
    reading.take_unless_off("min_timestep", "min_timestep", number)
    reading.take_unless_off("max_timestep", "max_timestep", lambda value: computed(value, lambda end: end - 1))


def resolution(value: Any) -> Any:
    """``512``, ``"512,768"``, ``[512, 768]`` -> "512", "512x768" (width x height)."""
    parts = value if isinstance(value, (list, tuple)) else str(value).replace("x", ",").split(",")
    sides = [str(part).strip() for part in parts if str(part).strip()]
    return "x".join(sides[:1] if len(set(sides)) == 1 else sides)


def optimizer(reading: Reading, theirs: str = "optimizer_type") -> None:
    word = str(reading.left.get(theirs) or "").strip()
    if word.lower().startswith("dadapt"):
        reading.pop(theirs)
        reading.translation.settings["optimizer"] = "prodigy"
        reading.unmet(theirs, word, "optimizer: prodigy takes its place, which finds its own learning rate too")
    else:
        if word.lower().startswith("paged") or word.lower() == "lion8bit":
            reading.note(f"{word} keeps its state in less memory; the update rule is the same.")
        choice(OPTIMIZERS, reading, theirs, "optimizer", "adamw", "; look whether the learning rate fits it")
    arguments = pairs(reading.pop("optimizer_args"))
    if word.lower().startswith("dadapt"):
        arguments = {name: value for name, value in arguments.items() if name in ("weight_decay", "betas", "decouple")}
    if arguments:
        reading.set("optimizer_args", "optimizer_args", arguments)


def schedule(reading: Reading) -> None:
    word = str(reading.left.get("lr_scheduler") or "").strip()
    if word == "adafactor":
        reading.note("Adafactor's own schedule is not used; the rate is constant.")
    choice(SCHEDULERS, reading, "lr_scheduler", "lr_scheduler", "constant")


def warmup(reading: Reading, theirs: str, *, percent: bool = False) -> None:
    """Steps, or below 1 a share of the run; the interface gives percent."""
    if is_off(reading.left.get(theirs)):
        reading.ignore(theirs)
        return
    value = number(reading.pop(theirs))
    if percent or (isinstance(value, (int, float)) and value < 1):
        reading.set(theirs, "lr_warmup_ratio", computed(value, lambda share: share / 100) if percent else value)
    else:
        reading.set(theirs, "lr_warmup_steps", value)


def rates(reading: Reading, *, unet_only: bool, text_encoder_only: bool) -> None:
    """``unet_lr`` and ``text_encoder_lr`` go before ``learning_rate``; which parts learn follows from them."""
    general = number(reading.pop("learning_rate"))
    unet, text = (one_rate(reading, name, reading.pop(name)) for name in ("unet_lr", "text_encoder_lr"))
    if unet is not None and is_on(unet):
        if general is not None and general != unet:
            reading.note(f"unet_lr ({unet}) counts, not learning_rate ({general}).")
        reading.set("unet_lr", "learning_rate", unet)
    elif general is not None and is_on(general):
        reading.set("learning_rate", "learning_rate", general)
    settings = reading.translation.settings
    text_rate = general if text is None else text
    if unet_only or (text is not None and is_off(text)):
        settings["train_text_encoder"] = False
        if is_on(reading.left.get("network_train_unet_only")):
            reading.take("network_train_unet_only", "train_text_encoder", is_off)
        reading.note("The text encoders do not learn: network_train_unet_only, or their rate is 0.")
        return
    settings["train_text_encoder"] = True
    if text_rate is not None and is_on(text_rate):
        reading.set("text_encoder_lr" if text is not None else "learning_rate", "text_encoder_lr", text_rate)
    else:
        settings["text_encoder_lr"] = settings.get("learning_rate")
    if text_encoder_only:
        reading.set("network_train_text_encoder_only", "target_modules", [])


def one_rate(reading: Reading, name: str, value: Any) -> Any:
    """One rate; of a list (one per text encoder) the first."""
    if isinstance(value, (list, tuple)):
        if len({str(number(one)) for one in value}) > 1:
            reading.note(f"{name} has several rates; the first counts.")
        value = value[0] if value else None
    return number(value)


def length(reading: Reading, epochs: Any, steps: Any) -> None:
    """Epochs go before steps; a number of steps alone is kept whatever it means in epochs."""
    epochs, steps = number(epochs), number(steps)
    if is_on(epochs):
        reading.set("max_train_epochs", "epochs", epochs)
    elif is_on(steps):
        reading.set("max_train_steps", "max_train_steps", steps)


def pairs(value: Any) -> dict[str, Any]:
    """``["a=1", "b=0.9,0.99"]`` or ``"a=1 b=True"`` -> values as Python reads them, as kohya's scripts do."""
    if is_off(value):
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    words = value if isinstance(value, (list, tuple)) else str(value).split()
    found = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if equals:
            found[name.strip().lstrip("-")] = _literal(text.strip())
    return found


def _literal(text: str) -> Any:
    value: Any = None
    if len(text) <= _LONGEST_LITERAL:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    if isinstance(value, tuple):
        value = list(value)
    if value is None or not _is_plain(value):
        return {"true": True, "false": False}.get(text.lower(), text.strip("\"'"))
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value can stand in YAML."""
    if isinstance(value, (list, dict)):
        return all(_is_plain(part) for part in ([*value, *value.values()] if isinstance(value, dict) else value))
    return isinstance(value, (bool, int, float, str))

